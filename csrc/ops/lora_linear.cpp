// Schemas, dispatcher handles and Meta kernels of lora_linear.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/lora_linear_blas.h"
#include "ops/lora_linear_registration.h"
#include "ops/operator.h"
#include "ops/tensors.h"

namespace lora_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd_meta(const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& bias, const Tensor& lora_A,
                                                const Tensor& lora_B,
                                                const OptionalTensor& lora_bias, double scaling,
                                                const OptionalTensor& scaling_tensor,
                                                double dropout_p, const OptionalTensor& rng_state,
                                                bool return_h) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, lora_bias,
                    {scaling, scaling_tensor, dropout_p, rng_state});
  auto y_sizes = x.sym_sizes().vec();
  y_sizes.back() = weight.sym_size(0);
  const auto compute = at::TensorOptions().dtype(at::toOpMathType(lora_A.scalar_type()));
  Tensor h = return_h ? lora_A.new_empty_symint({count_rows(x), lora_A.sym_size(0)}, compute)
                      : lora_A.new_empty_symint({0}, compute);
  return {x.new_empty_symint(y_sizes), h};
}

Gradients lora_linear_bwd_meta(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                               const OptionalTensor& weight, const Tensor& lora_A,
                               const Tensor& lora_B, double scaling,
                               const OptionalTensor& scaling_tensor, double dropout_p,
                               const OptionalTensor& rng_state, GradientMask mask) {
  check_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B,
                        {scaling, scaling_tensor, dropout_p, rng_state}, mask);
  const c10::SymInt K = lora_A.sym_size(1), N = dy.sym_size(-1);
  auto dx_sizes = dy.sym_sizes().vec();
  dx_sizes.back() = K;
  const auto gradient = [](bool wanted, const Tensor& like, std::vector<c10::SymInt> sizes) {
    return like.new_empty_symint(wanted ? sizes : std::vector<c10::SymInt>{0});
  };
  return {gradient(mask[kGradX], dy, dx_sizes),
          gradient(mask[kGradWeight], dy, {N, K}),
          gradient(mask[kGradBias], dy, {N}),
          gradient(mask[kGradA], lora_A, lora_A.sym_sizes().vec()),
          gradient(mask[kGradB], lora_B, lora_B.sym_sizes().vec()),
          gradient(mask[kGradLoraBias], lora_B, {N})};
}

std::tuple<Tensor, Tensor> lora_linear_fwd_composed(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
    const Tensor& lora_B, const OptionalTensor& lora_bias, double scaling,
    const OptionalTensor& scaling_tensor, double dropout_p, const OptionalTensor& rng_state,
    bool return_h) {
  const LoraScale scale{scaling, scaling_tensor, dropout_p, rng_state};
  check_lora_linear(x, weight, bias, lora_A, lora_B, lora_bias, scale);
  return composed_fwd(x, weight, bias, lora_A, lora_B, lora_bias, scale, return_h);
}

Gradients lora_linear_bwd_composed(const Tensor& dy, const OptionalTensor& x,
                                   const OptionalTensor& h, const OptionalTensor& weight,
                                   const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                   const OptionalTensor& scaling_tensor, double dropout_p,
                                   const OptionalTensor& rng_state, GradientMask mask) {
  const LoraScale scale{scaling, scaling_tensor, dropout_p, rng_state};
  check_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B, scale, mask);
  return composed_bwd(dy, x, h, weight, lora_A, lora_B, scale, mask);
}

}  // namespace

Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& lora_bias,
                   const LoraScale& scale) {
  static const auto op = find_op<LoraLinearSignature>("lora_ext::lora_linear");
  return op.call(x, weight, bias, lora_A, lora_B, lora_bias, scale.scaling, scale.scaling_tensor,
                 scale.dropout_p, scale.rng_state);
}

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& lora_A,
                                           const Tensor& lora_B, const OptionalTensor& lora_bias,
                                           const LoraScale& scale, bool return_h) {
  static const auto op = find_op<LoraLinearFwdSignature>("lora_ext::lora_linear_fwd");
  return op.call(x, weight, bias, lora_A, lora_B, lora_bias, scale.scaling, scale.scaling_tensor,
                 scale.dropout_p, scale.rng_state, return_h);
}

Gradients lora_linear_bwd(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                          const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                          const LoraScale& scale, const GradientMask& mask) {
  static const auto op = find_op<LoraLinearBwdSignature>("lora_ext::lora_linear_bwd");
  return op.call(dy, x, h, weight, lora_A, lora_B, scale.scaling, scale.scaling_tensor,
                 scale.dropout_p, scale.rng_state, mask);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_bias=None, float scaling=1.0, Tensor? scaling_tensor=None, "
      "float dropout_p=0.0, Tensor? rng_state=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "Tensor? lora_bias=None, float scaling=1.0, Tensor? scaling_tensor=None, "
      "float dropout_p=0.0, Tensor? rng_state=None, bool return_h=False) -> (Tensor y, Tensor h)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_bwd(Tensor dy, Tensor? x, Tensor? h, Tensor? weight, Tensor lora_A, "
      "Tensor lora_B, float scaling, Tensor? scaling_tensor, float dropout_p, "
      "Tensor? rng_state, bool[6] mask) -> (Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dlora_A, Tensor dlora_B, Tensor dlora_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear_fwd", &lora_linear_fwd_meta);
  m.impl("lora_linear_bwd", &lora_linear_bwd_meta);
}

// Backends without kernels of their own; sparse and quantized tensors are refused by the checks.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_fwd", &lora_linear_fwd_composed);
  m.impl("lora_linear_bwd", &lora_linear_bwd_composed);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
