#include "ops/lora_linear_prepare.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

namespace lora_ext {
namespace {

// The sizes of [..., old width] with another width.
std::vector<int64_t> with_width(const Tensor& tensor, int64_t width) {
  auto sizes = tensor.sizes().vec();
  sizes.back() = width;
  return sizes;
}

// bias + scaling * lora_bias in `dtype`; undefined if there is neither.
Tensor total_bias(const OptionalTensor& bias, const OptionalTensor& lora_bias,
                  const LoraScale& scale, at::ScalarType dtype) {
  Tensor total;
  if (bias.has_value()) total = bias->to(dtype);
  if (lora_bias.has_value()) {
    Tensor scaled = lora_bias->to(dtype) * scale.scaling;
    if (scale.scaling_tensor.has_value()) scaled = scaled * *scale.scaling_tensor;
    total = total.defined() ? total + scaled : scaled;
  }
  return total.defined() ? total.contiguous() : total;
}

}  // namespace

Tensor as_rows(const Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const Tensor flat = tensor.dim() == 2 ? tensor : tensor.reshape({rows, width});
  return flat.stride(1) == 1 || width == 1 ? flat : flat.contiguous();
}

Tensor as_vector(const OptionalTensor& vector, at::ScalarType dtype) {
  return vector.has_value() ? vector->to(dtype).contiguous() : Tensor();
}

LoraScale read_scaling(LoraScale scale) {
  if (scale.scaling_tensor.has_value()) {
    scale.scaling *= scale.scaling_tensor->item<double>();
    scale.scaling_tensor.reset();
  }
  return scale;
}

PreparedForward prepare_forward(const Tensor& x, const OptionalTensor& bias, const Tensor& lora_A,
                                const Tensor& lora_B, const OptionalTensor& lora_bias,
                                const LoraScale& scale, bool return_h) {
  const Tensor rows = as_rows(x);
  const int64_t M = rows.size(0), N = lora_B.size(0), r = lora_A.size(0);
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const auto h_options = lora_A.options().dtype(compute);
  Tensor y = at::empty(with_width(x, N), x.options());
  Tensor h = return_h ? at::empty({M, r}, h_options) : at::empty({0}, h_options);
  return {y, h,
          LowRankForward{rows, lora_A.contiguous(), lora_B.contiguous(),
                         total_bias(bias, lora_bias, scale, compute), scale, y.view({M, N}),
                         return_h ? h : Tensor()}};
}

PreparedBackward prepare_backward(const Tensor& dy, const OptionalTensor& x,
                                  const OptionalTensor& h, const Tensor& lora_A,
                                  const Tensor& lora_B, const LoraScale& scale,
                                  const GradientMask& mask) {
  const Tensor dy_rows = as_rows(dy), x_rows = x.has_value() ? as_rows(*x) : Tensor();
  const int64_t M = dy_rows.size(0), K = lora_A.size(1);
  const auto gradient = [](bool wanted, const Tensor& like, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, like.options());
  };
  Tensor dx = gradient(mask[kGradX], dy, with_width(dy, K));
  Tensor dA = gradient(mask[kGradA], lora_A, lora_A.sizes());
  Tensor dB = gradient(mask[kGradB], lora_B, lora_B.sizes());
  Tensor dweight = mask[kGradWeight] ? at::mm(dy_rows.t(), x_rows) : gradient(false, dy, {});
  Tensor dbias = gradient(false, dy, {}), dlora_bias = gradient(false, lora_B, {});
  if (mask[kGradBias] || mask[kGradLoraBias]) {
    const Tensor sum = dy_rows.sum(0, false, at::toOpMathType(dy.scalar_type()));
    if (mask[kGradBias]) dbias = sum.to(dy.scalar_type());
    if (mask[kGradLoraBias]) {
      Tensor scaled = sum * scale.scaling;
      if (scale.scaling_tensor.has_value()) scaled = scaled * *scale.scaling_tensor;
      dlora_bias = scaled.to(lora_B.scalar_type());
    }
  }
  if (M == 0) dA.zero_(), dB.zero_();
  const bool done = M == 0 || !(mask[kGradX] || mask[kGradA] || mask[kGradB]);
  return {{dx, dweight, dbias, dA, dB, dlora_bias},
          LowRankBackward{dy_rows, x_rows, h.has_value() ? h->contiguous() : Tensor(),
                          lora_A.contiguous(), lora_B.contiguous(), scale,
                          mask[kGradX] ? dx.view({M, K}) : Tensor(), mask[kGradA] ? dA : Tensor(),
                          mask[kGradB] ? dB : Tensor()},
          done};
}

}  // namespace lora_ext
