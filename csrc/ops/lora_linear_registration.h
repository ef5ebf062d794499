// The unboxed C++ signatures behind the schemas of lora_linear, for those who register kernels.
#pragma once

#include "ops/lora_linear.h"

namespace lora_ext {

using LoraLinearSignature = Tensor(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& lora_A,
                                   const Tensor& lora_B, const OptionalTensor& lora_bias,
                                   double scaling, const OptionalTensor& scaling_tensor,
                                   double dropout_p, const OptionalTensor& rng_state);

using LoraLinearFwdSignature = std::tuple<Tensor, Tensor>(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
    const Tensor& lora_B, const OptionalTensor& lora_bias, double scaling,
    const OptionalTensor& scaling_tensor, double dropout_p, const OptionalTensor& rng_state,
    bool return_h);

using LoraLinearBwdSignature = Gradients(const Tensor& dy, const OptionalTensor& x,
                                         const OptionalTensor& h, const OptionalTensor& weight,
                                         const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                         const OptionalTensor& scaling_tensor, double dropout_p,
                                         const OptionalTensor& rng_state, GradientMask mask);

// The operator out of ATen's operators, with their roundings (see transforms.h).
LoraLinearSignature lora_linear_decomposed;

}  // namespace lora_ext
