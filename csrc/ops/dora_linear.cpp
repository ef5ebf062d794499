// Schemas and Meta kernels of dora_linear, and its form out of other operators.
#include "ops/dora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/column_scale.h"
#include "ops/dropout.h"

namespace lora_ext {
namespace {

c10::SymIntArrayRef leading(const Tensor& tensor) {
  return tensor.sym_sizes().slice(0, tensor.dim() - 1);
}

Tensor empty_like_rows(const Tensor& tensor, const c10::SymInt& width) {
  auto sizes = leading(tensor).vec();
  sizes.push_back(width);
  return tensor.new_empty_symint(sizes);
}

std::tuple<Tensor, Tensor> dora_linear_fwd_meta(const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& bias, const Tensor& lora_A,
                                                const Tensor& lora_B, const Tensor& scale,
                                                double scaling, double dropout_p,
                                                const Tensor& rng_state) {
  check_dora_linear(x, weight, bias, lora_A, lora_B, scale,
                    {scaling, std::nullopt, dropout_p, rng_state});
  return {empty_like_rows(x, weight.sym_size(0)), empty_like_rows(x, weight.sym_size(0))};
}

DoraGradients dora_linear_bwd_meta(const Tensor& dy, const OptionalTensor& x,
                                   const OptionalTensor& v, const OptionalTensor& weight,
                                   const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                   double scaling, double dropout_p, const Tensor& rng_state,
                                   DoraMask mask) {
  check_dora_linear_bwd(dy, x, v, weight, lora_A, lora_B, scale,
                        {scaling, std::nullopt, dropout_p, rng_state}, mask);
  const auto compute = dy.options().dtype(at::toOpMathType(dy.scalar_type()));
  const c10::SymInt N = dy.sym_size(-1), none = 0;
  const auto gradient = [&](bool wanted, const Tensor& like) {
    return wanted ? like.new_empty_symint(like.sym_sizes()) : like.new_empty_symint({none});
  };
  return {mask[kDoraX] ? empty_like_rows(dy, lora_A.sym_size(1)) : dy.new_empty_symint({none}),
          dy.new_empty_symint({mask[kDoraBias] ? N : none}), gradient(mask[kDoraA], lora_A),
          gradient(mask[kDoraB], lora_B),
          dy.new_empty_symint({mask[kDoraScale] ? N : none}, compute)};
}

Tensor minus_one(const Tensor& scale, const Tensor& x) {
  return scale.to(at::toOpMathType(x.scalar_type())) - 1;
}

}  // namespace

std::tuple<Tensor, Tensor> dora_linear_fwd_composed(const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias,
                                                    const Tensor& lora_A, const Tensor& lora_B,
                                                    const Tensor& scale, double scaling,
                                                    double dropout_p, const Tensor& rng_state) {
  const LoraScale lora_scale{scaling, std::nullopt, dropout_p, rng_state};
  check_dora_linear(x, weight, bias, lora_A, lora_B, scale, lora_scale);
  Tensor y = std::get<0>(
      lora_linear_fwd(x, weight, bias, lora_A, lora_B, std::nullopt, lora_scale, false));
  Tensor v = at::matmul(dropout(x, rng_state, dropout_p), weight.t());
  const Tensor factor = minus_one(scale, x);
  // Rounded once, where ATen multiplies and adds in the dtype of y.
  const bool same = factor.scalar_type() == y.scalar_type();
  return {same ? y.addcmul_(v, factor) : y.add_(column_scale(v, factor, std::nullopt)), v};
}

DoraGradients dora_linear_bwd_composed(const Tensor& dy, const OptionalTensor& x,
                                       const OptionalTensor& v, const OptionalTensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B,
                                       const Tensor& scale, double scaling, double dropout_p,
                                       const Tensor& rng_state, DoraMask mask) {
  const LoraScale lora_scale{scaling, std::nullopt, dropout_p, rng_state};
  check_dora_linear_bwd(dy, x, v, weight, lora_A, lora_B, scale, lora_scale, mask);
  auto [dv, dscale, dbias] = column_scale_bwd(dy, v, minus_one(scale, dy),
                                              {mask[kDoraX], mask[kDoraScale], mask[kDoraBias]});
  auto [dx, dweight, no_bias, dA, dB, no_lora_bias] =
      lora_linear_bwd(dy, x, std::nullopt, weight, lora_A, lora_B, lora_scale,
                      {mask[kDoraX], false, false, mask[kDoraA], mask[kDoraB], false});
  if (mask[kDoraX]) dx.add_(dropout(at::matmul(dv, *weight), rng_state, dropout_p));
  return {dx, dbias.to(dy.scalar_type()), dA, dB, dscale};
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "dora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor scale, float scaling, float dropout_p, Tensor rng_state) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor scale, float scaling, float dropout_p, Tensor rng_state) -> (Tensor y, Tensor v)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dora_linear_bwd(Tensor dy, Tensor? x, Tensor? v, Tensor? weight, Tensor lora_A, "
      "Tensor lora_B, Tensor scale, float scaling, float dropout_p, Tensor rng_state, "
      "bool[5] mask) -> (Tensor dx, Tensor dbias, Tensor dlora_A, Tensor dlora_B, Tensor dscale)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("dora_linear_fwd", &dora_linear_fwd_meta);
  m.impl("dora_linear_bwd", &dora_linear_bwd_meta);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("dora_linear_fwd", &dora_linear_fwd_composed);
  m.impl("dora_linear_bwd", &dora_linear_bwd_composed);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("dora_linear_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("dora_linear_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
