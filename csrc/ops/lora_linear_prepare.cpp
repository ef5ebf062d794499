// Allocations, biases, and the gradients of weight and biases, alike on every device.
#include "ops/lora_linear_prepare.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "ops/product.h"

namespace lora_ext {
namespace {

// bias + scaling * lora_bias in `dtype`; undefined if there is neither.
Tensor total_bias(const LoraLinearCall& call, at::ScalarType dtype) {
  Tensor total;
  if (call.bias.has_value()) total = call.bias->to(dtype);
  if (call.lora_bias.has_value()) {
    const Tensor scaled = call.scaling.times(call.lora_bias->to(dtype));
    total = total.defined() ? total + scaled : scaled;
  }
  return total.defined() ? total.contiguous() : total;
}

}  // namespace

PreparedForward lora_linear_prepare_fwd(const LoraLinearCall& call, bool return_h,
                                        const Tensor& given_y, const Tensor& given_h) {
  const auto &lora_A = call.lora_A, &lora_B = call.lora_B;
  const Tensor rows = as_rows(call.x);
  const int64_t M = rows.size(0), N = lora_B.size(0), r = lora_A.size(0);
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const auto h_options = lora_A.options().dtype(compute);
  Tensor y = given_y, h = given_h;
  if (!y.defined()) y = at::empty_symint(with_width(call.x, N), call.x.options());
  if (!h.defined()) h = return_h ? at::empty({M, r}, h_options) : at::empty({0}, h_options);
  return {y, h,
          LowRankForward{rows, lora_A.contiguous(), lora_B.contiguous(), total_bias(call, compute),
                         call.scaling, call.dropout, y.view({M, N}), return_h ? h : Tensor()}};
}

PreparedBackward lora_linear_prepare_bwd(const LoraLinearBackwardCall& call,
                                         const GradientMask& mask, const Tensor& given_dx) {
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const Tensor dy_rows = as_rows(dy), x_rows = call.x.has_value() ? as_rows(*call.x) : Tensor();
  const int64_t M = dy_rows.size(0), K = lora_A.size(1);
  Tensor dx = given_dx;
  if (!dx.defined()) dx = gradient_or_empty(mask[kGradX], dy, with_width(dy, K));
  Tensor dA = gradient_or_empty(mask[kGradA], lora_A);
  Tensor dB = gradient_or_empty(mask[kGradB], lora_B);
  Tensor dweight = mask[kGradWeight] ? product(dy_rows.t(), x_rows) : at::empty({0}, dy.options());
  Tensor dbias = at::empty({0}, dy.options()), dlora_bias = at::empty({0}, lora_B.options());
  if (mask[kGradBias] || mask[kGradLoraBias]) {
    const Tensor sum = dy_rows.sum(0, false, at::toOpMathType(dy.scalar_type()));
    if (mask[kGradBias]) dbias = sum.to(dy.scalar_type());
    if (mask[kGradLoraBias]) dlora_bias = call.scaling.times(sum).to(lora_B.scalar_type());
  }
  if (M == 0) dA.zero_(), dB.zero_();
  const bool done = M == 0 || !(mask[kGradX] || mask[kGradA] || mask[kGradB]);
  return {{dx, dweight, dbias, dA, dB, dlora_bias},
          LowRankBackward{dy_rows, x_rows, call.h.has_value() ? call.h->contiguous() : Tensor(),
                          lora_A.contiguous(), lora_B.contiguous(), call.scaling, call.dropout,
                          mask[kGradX] ? dx.view({M, K}) : Tensor(), mask[kGradA] ? dA : Tensor(),
                          mask[kGradB] ? dB : Tensor()},
          done};
}

}  // namespace lora_ext
