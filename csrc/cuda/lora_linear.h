// What is told about lora_linear on CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "cuda/lora_linear_path.h"
#include "cuda/lora_linear_tuned.h"

namespace lora_ext {

// Of the environment variable LORA_EXT_CUDA_PATH, read once per process.
CudaWish cuda_wish();

TunedPaths& tuned_paths();

// Of a matrix of 16-bit elements whose neighbouring columns are adjacent.
Rows rows_of(const at::Tensor& matrix);

// x, dy and the results as contiguous matrices, and the weight [N, K] if it is known.
CudaCall make_cuda_call(bool backward, int device, int64_t tokens, int64_t out_features,
                        int64_t in_features, int64_t r, at::ScalarType base, at::ScalarType adapter,
                        bool dropout, const std::optional<at::Tensor>& weight = std::nullopt);

CudaPath cuda_path(const CudaCall& call, int compute_capability);

// Whether a GPU of this kind has more than cuBLAS's products for such calls.
bool has_cuda_kernels(const CudaCall& call, int compute_capability);

// (path, reason) of a call, forward and backward, on a GPU of this compute capability (80 for
// sm_80).
std::pair<std::string, std::string> explain_lora_linear_cuda(CudaCall call, int compute_capability);

// `path` is one of kCudaPaths but "auto"; none forgets what was measured.
void set_tuned_cuda_path(const CudaCall& call, const std::optional<std::string>& path);

}  // namespace lora_ext
