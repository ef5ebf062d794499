#include <ATen/ATen.h>

#include "ops/lora_linear_blas.h"
#include "ops/lora_linear_prepare.h"
#include "ops/low_rank.h"

namespace lora_ext {

std::tuple<Tensor, Tensor> composed_fwd(const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& bias, const Tensor& lora_A,
                                        const Tensor& lora_B, const OptionalTensor& lora_bias,
                                        const LoraScale& scale, bool return_h) {
  auto [y, h, low_rank] = prepare_forward(x, bias, lora_A, lora_B, lora_bias, scale, return_h);
  if (y.numel() == 0) return {y, h.zero_()};
  low_rank_forward_blas(low_rank);
  low_rank.y.addmm_(low_rank.x, weight.t());
  return {y, h};
}

Gradients composed_bwd(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                       const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       const LoraScale& scale, const GradientMask& mask) {
  auto [gradients, low_rank, done] = prepare_backward(dy, x, h, lora_A, lora_B, scale, mask);
  if (done) return gradients;
  low_rank_backward_blas(low_rank);
  if (mask[kGradX]) low_rank.dx.addmm_(low_rank.dy, *weight);
  return gradients;
}

}  // namespace lora_ext
