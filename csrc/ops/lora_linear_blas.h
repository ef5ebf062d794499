// lora_linear out of ATen's products alone, on any device and in any dtypes, with the same dropout
// mask: a backend's way where it has no kernels. Nothing is read back from the device, so that a
// CUDA graph can capture a call. Arguments are checked before; they and the results are those of
// lora_linear_fwd and lora_linear_bwd.
#pragma once

#include "ops/lora_linear.h"

namespace lora_ext {

std::tuple<Tensor, Tensor> composed_fwd(const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& bias, const Tensor& lora_A,
                                        const Tensor& lora_B, const OptionalTensor& lora_bias,
                                        const LoraScale& scale, bool return_h);

Gradients composed_bwd(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                       const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       const LoraScale& scale, const GradientMask& mask);

}  // namespace lora_ext
