// Schemas, dispatcher handles, checks and Meta kernels of lora_linear_quantized, and its form out
// of a dequantized matrix, for devices without kernels of their own.
#include "ops/lora_linear_quantized.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/dequantize.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

constexpr const char* kOp = "lora_linear_quantized";
constexpr const char* kBwdOp = "lora_linear_quantized_bwd";

std::tuple<Tensor, Tensor> lora_linear_quantized_fwd_meta(const LoraLinearQuantizedCall& call,
                                                          bool return_h) {
  const int64_t N = check_lora_linear_quantized(call).N;
  const auto &x = call.x, &lora_A = call.lora_A;
  const auto compute = at::TensorOptions().dtype(at::toOpMathType(lora_A.scalar_type()));
  const Tensor h = return_h ? lora_A.new_empty_symint({count_rows(x), lora_A.sym_size(0)}, compute)
                            : lora_A.new_empty_symint({0}, compute);
  return {x.new_empty_symint(with_width(x, N)), h};
}

QuantizedGradients lora_linear_quantized_bwd_meta(const LoraLinearQuantizedBackwardCall& call,
                                                  QuantizedMask mask) {
  check_lora_linear_quantized_bwd(call, mask);
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const c10::SymInt K = lora_A.sym_size(1), N = dy.sym_size(-1);
  return {gradient_or_empty(mask[0], dy, with_width(dy, K)), gradient_or_empty(mask[1], dy, N),
          gradient_or_empty(mask[2], lora_A), gradient_or_empty(mask[3], lora_B),
          gradient_or_empty(mask[4], lora_B, N)};
}

std::tuple<Tensor, Tensor> lora_linear_quantized_fwd_composed(const LoraLinearQuantizedCall& call,
                                                              bool return_h) {
  check_lora_linear_quantized(call);
  const Tensor weight = dequantize(call.weight, call.x.scalar_type());
  return lora_linear_fwd(call.with(weight), return_h);
}

QuantizedGradients lora_linear_quantized_bwd_composed(const LoraLinearQuantizedBackwardCall& call,
                                                      QuantizedMask mask) {
  const auto fields = check_lora_linear_quantized_bwd(call, mask);
  OptionalTensor weight;
  if (fields.has_value()) weight = dequantize(call.weight, call.dy.scalar_type());
  return without_weight(lora_linear_bwd(call.with(weight), with_weight(mask)));
}

}  // namespace

QuantizedFields check_lora_linear_quantized(const LoraLinearQuantizedCall& call) {
  const auto& x = call.x;
  const auto [N, K] = checked_shape(kOp, call.weight);
  check_lora_linear_input(x, {N, K}, call.lora_A, kOp);
  TORCH_CHECK_VALUE(x.sym_size(-1) == K, kOp, ": weight: got shape [", N, ", ", K,
                    "], expected [out_features, ", x.sym_size(-1),
                    "], in_features being the input's last dimension");
  QuantizedFields fields = checked_fields(kOp, call.weight, x);
  check_lora_linear_adapter(call.with(x), N, kOp);
  return fields;
}

std::optional<QuantizedFields> check_lora_linear_quantized_bwd(
    const LoraLinearQuantizedBackwardCall& call, const QuantizedMask& mask) {
  const auto& dy = call.dy;
  GradientMask without_dx = with_weight(mask);
  without_dx[kGradX] = false;
  check_lora_linear_bwd(call.with(kNoTensor), without_dx, kBwdOp);
  if (!mask[0]) return std::nullopt;
  const auto [N, K] = checked_shape(kBwdOp, call.weight);
  TORCH_CHECK_VALUE(dy.sym_size(-1) == N && call.lora_A.sym_size(1) == K, kBwdOp,
                    ": weight: got shape [", N, ", ", K, "], expected [", dy.sym_size(-1), ", ",
                    call.lora_A.sym_size(1), "], [out_features, in_features]");
  return checked_fields(kBwdOp, call.weight, dy);
}

Tensor lora_linear_quantized(const LoraLinearQuantizedCall& call) {
  static const Operator<&lora_linear_quantized> op("lora_ext::lora_linear_quantized");
  return op(call);
}

std::tuple<Tensor, Tensor> lora_linear_quantized_fwd(const LoraLinearQuantizedCall& call,
                                                     bool return_h) {
  static const Operator<&lora_linear_quantized_fwd> op("lora_ext::lora_linear_quantized_fwd");
  return op(call, return_h);
}

QuantizedGradients lora_linear_quantized_bwd(const LoraLinearQuantizedBackwardCall& call,
                                             QuantizedMask mask) {
  static const Operator<&lora_linear_quantized_bwd> op("lora_ext::lora_linear_quantized_bwd");
  return op(call, mask);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_linear_quantized(Tensor x, Tensor[] weight, int[] layout, float[] numbers, "
      "Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? lora_bias=None, float scaling=1.0, "
      "Tensor? scaling_tensor=None, float dropout_p=0.0, Tensor? rng_state=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_quantized_fwd(Tensor x, Tensor[] weight, int[] layout, float[] numbers, "
      "Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? lora_bias=None, float scaling=1.0, "
      "Tensor? scaling_tensor=None, float dropout_p=0.0, Tensor? rng_state=None, "
      "bool return_h=False) -> (Tensor y, Tensor h)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_quantized_bwd(Tensor dy, Tensor? x, Tensor? h, Tensor[] weight, int[] layout, "
      "float[] numbers, Tensor lora_A, Tensor lora_B, float scaling, Tensor? scaling_tensor, "
      "float dropout_p, Tensor? rng_state, bool[5] mask) -> (Tensor dx, Tensor dbias, "
      "Tensor dlora_A, Tensor dlora_B, Tensor dlora_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear_quantized_fwd", flat<&lora_linear_quantized_fwd_meta>);
  m.impl("lora_linear_quantized_bwd", flat<&lora_linear_quantized_bwd_meta>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_quantized_fwd", flat<&lora_linear_quantized_fwd_composed>);
  m.impl("lora_linear_quantized_bwd", flat<&lora_linear_quantized_bwd_composed>);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_quantized_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_quantized_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
