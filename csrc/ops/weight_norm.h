// weight_norm, the norm of every row of weight + scaling * B A.
#pragma once

#include "ops/tensors.h"

namespace lora_ext {

// [N] in the compute type. A constant for autograd (arXiv:2402.09353, section 4.3).
Tensor weight_norm(const Tensor& weight,  // [N, K]
                   const Tensor& lora_A,  // [r, K]
                   const Tensor& lora_B,  // [N, r]
                   double scaling);

// Out of ATen's operators, for what has no kernel.
Tensor weight_norm_composed(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                            double scaling);

void check_weight_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B);

}  // namespace lora_ext
