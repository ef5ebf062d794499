// What is told about lora_linear_grouped on CUDA.
#pragma once

#include <string>
#include <utility>

#include "cuda/lora_linear_grouped_path.h"

namespace lora_ext {

// (path, reason) of a call whose largest rank `call` has, on a GPU of this compute capability.
std::pair<std::string, std::string> explain_lora_linear_grouped_cuda(CudaCall call,
                                                                     int compute_capability);

}  // namespace lora_ext
