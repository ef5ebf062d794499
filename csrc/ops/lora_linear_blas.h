// lora_linear out of ATen's products: BLAS calls, on any device and in any pair of dtypes, with the
// same dropout mask as the kernels. Nothing is read back from the device, so that a CUDA graph can
// capture a call.
#pragma once

#include "ops/lora_linear_prepare.h"

namespace lora_ext {

// The low-rank part. Under dropout x is copied without the dropped elements, a block of its rows at
// a time; a scaling tensor stays on its device.
void low_rank_forward_blas(const LowRankForward& problem);
void low_rank_backward_blas(const LowRankBackward& problem);

// All of lora_linear_fwd and lora_linear_bwd: a backend's way where it has no kernels.
std::tuple<Tensor, Tensor> lora_linear_fwd_composed(const LoraLinearCall& call, bool return_h);
Gradients lora_linear_bwd_composed(const LoraLinearBackwardCall& call, GradientMask mask);

}  // namespace lora_ext
