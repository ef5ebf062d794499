// Schemas, dispatcher handles, checks and Meta kernels of dora_linear, and its form out of other
// operators.
#include "ops/dora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/column_scale.h"
#include "ops/dropout.h"
#include "ops/operator.h"
#include "ops/product.h"

namespace lora_ext {
namespace {

std::tuple<Tensor, Tensor> dora_linear_fwd_meta(const DoraLinearCall& call) {
  check_dora_linear(call);
  const auto sizes = with_width(call.x, call.weight.sym_size(0));
  return {call.x.new_empty_symint(sizes), call.x.new_empty_symint(sizes)};
}

DoraGradients dora_linear_bwd_meta(const DoraLinearBackwardCall& call, DoraMask mask) {
  check_dora_linear_bwd(call, mask);
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto compute = dy.options().dtype(at::toOpMathType(dy.scalar_type()));
  const c10::SymInt N = dy.sym_size(-1), none = 0;
  return {gradient_or_empty(mask[kDoraX], dy, with_width(dy, lora_A.sym_size(1))),
          gradient_or_empty(mask[kDoraBias], dy, N), gradient_or_empty(mask[kDoraA], lora_A),
          gradient_or_empty(mask[kDoraB], lora_B),
          dy.new_empty_symint({mask[kDoraScale] ? N : none}, compute)};
}

Tensor minus_one(const Tensor& scale, const Tensor& x) {
  return scale.to(at::toOpMathType(x.scalar_type())) - 1;
}

void check_scale_and_rng_state(const char* op, const Tensor& x, const Tensor& scale,
                               const c10::SymInt& N, const Tensor& rng_state) {
  check_factor(op, "scale", scale, x, N);
  check_device(op, "rng_state", rng_state, x);
  check_rng_state(op, rng_state);
}

}  // namespace

void check_dora_linear(const DoraLinearCall& call) {
  constexpr const char* op = "dora_linear";
  check_lora_linear(call.lora_linear(), op);
  check_scale_and_rng_state(op, call.x, call.scale, call.weight.sym_size(0), call.rng_state);
}

void check_dora_linear_bwd(const DoraLinearBackwardCall& call, const DoraMask& mask) {
  constexpr const char* op = "dora_linear_bwd";
  const auto& dy = call.dy;
  const auto& v = call.v;
  check_lora_linear_bwd(call.lora_linear(), lora_linear_mask(mask), op);
  check_scale_and_rng_state(op, dy, call.scale, dy.sym_size(-1), call.rng_state);
  TORCH_CHECK_VALUE(!mask[kDoraScale] || v.has_value(), op,
                    ": v: got None, expected [..., out_features] for the gradient of scale");
  if (!v.has_value()) return;
  check_device(op, "v", *v, dy);
  TORCH_CHECK_VALUE(v->sym_sizes() == dy.sym_sizes(), op, ": v: got shape ", v->sym_sizes(),
                    ", expected dy's ", dy.sym_sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == dy.scalar_type(), op, ": v: got dtype ",
                   dtype_name(v->scalar_type()), ", expected dy's ", dtype_name(dy.scalar_type()));
}

std::tuple<Tensor, Tensor> dora_linear_fwd_composed(const DoraLinearCall& call) {
  check_dora_linear(call);
  const auto &x = call.x, &weight = call.weight;
  const Tensor d = dropout(x, call.rng_state, call.dropout_p), factor = minus_one(call.scale, x);
  const Tensor v = linear_product(d, weight);
  if (factor.scalar_type() == x.scalar_type()) {
    // The low-rank product is the largest where most is dropped: it comes last, rounded once.
    const int64_t M = count_rows(x).expect_int(), N = weight.size(0);
    Tensor y = linear_product(x, weight, call.bias).contiguous().addcmul_(v, factor);
    const Tensor h = at::mm(d.view({M, x.size(-1)}), call.lora_A.t());
    y.view({M, N}).addmm_(h, call.lora_B.t(), 1, call.scaling);
    return {y, v};
  }
  Tensor y = std::get<0>(lora_linear_fwd(call.lora_linear(), false));
  return {y.add_(column_scale(v, factor, std::nullopt)), v};
}

DoraGradients dora_linear_bwd_composed(const DoraLinearBackwardCall& call, DoraMask mask) {
  check_dora_linear_bwd(call, mask);
  const auto& dy = call.dy;
  auto [dv, dscale, dbias] = column_scale_bwd(dy, call.v, minus_one(call.scale, dy),
                                              {mask[kDoraX], mask[kDoraScale], mask[kDoraBias]});
  auto [dx, dweight, no_bias, dA, dB, no_lora_bias] =
      lora_linear_bwd(call.lora_linear(), lora_linear_mask(mask));
  if (mask[kDoraX]) {
    dx.add_(dropout(linear_product(dv, call.weight->t()), call.rng_state, call.dropout_p));
  }
  return {dx, dbias.to(dy.scalar_type()), dA, dB, dscale};
}

Tensor dora_linear(const DoraLinearCall& call) {
  static const Operator<&dora_linear> op("lora_ext::dora_linear");
  return op(call);
}

std::tuple<Tensor, Tensor> dora_linear_fwd(const DoraLinearCall& call) {
  static const Operator<&dora_linear_fwd> op("lora_ext::dora_linear_fwd");
  return op(call);
}

DoraGradients dora_linear_bwd(const DoraLinearBackwardCall& call, DoraMask mask) {
  static const Operator<&dora_linear_bwd> op("lora_ext::dora_linear_bwd");
  return op(call, mask);
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
  m.impl("dora_linear_fwd", flat<&dora_linear_fwd_meta>);
  m.impl("dora_linear_bwd", flat<&dora_linear_bwd_meta>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("dora_linear_fwd", flat<&dora_linear_fwd_composed>);
  m.impl("dora_linear_bwd", flat<&dora_linear_bwd_composed>);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("dora_linear_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("dora_linear_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
