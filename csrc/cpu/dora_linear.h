// What is told about dora_linear on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>

namespace lora_ext {

// (skips dropped elements, reason) for so many rows.
std::pair<bool, std::string> explain_dora_linear_cpu(int64_t tokens, at::ScalarType base,
                                                     double dropout_p);

}  // namespace lora_ext
