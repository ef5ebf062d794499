// What is told about lora_linear on CUDA.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <utility>

#include "cuda/path.h"

namespace lora_ext {

// Of the environment variable LORA_EXT_CUDA_PATH, read once per process.
CudaWish cuda_wish();

CudaPath cuda_path(int64_t out_features, int64_t in_features, int64_t r, at::ScalarType base,
                   int compute_capability);

// (path, reason) of a layer on a GPU of this compute capability (80 for sm_80).
std::pair<std::string, std::string> explain_lora_linear_cuda(int64_t out_features,
                                                             int64_t in_features, int64_t r,
                                                             at::ScalarType base,
                                                             int compute_capability);

}  // namespace lora_ext
