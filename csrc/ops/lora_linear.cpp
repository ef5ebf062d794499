// Schemas, dispatcher handles, checks and Meta kernels of lora_linear.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/lora_linear_blas.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd_meta(const LoraLinearCall& call, bool return_h) {
  check_lora_linear(call);
  const auto &x = call.x, &lora_A = call.lora_A;
  const auto compute = at::TensorOptions().dtype(at::toOpMathType(lora_A.scalar_type()));
  Tensor h = return_h ? lora_A.new_empty_symint({count_rows(x), lora_A.sym_size(0)}, compute)
                      : lora_A.new_empty_symint({0}, compute);
  return {x.new_empty_symint(with_width(x, call.weight.sym_size(0))), h};
}

Gradients lora_linear_bwd_meta(const LoraLinearBackwardCall& call, GradientMask mask) {
  check_lora_linear_bwd(call, mask);
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const c10::SymInt K = lora_A.sym_size(1), N = dy.sym_size(-1);
  return {gradient_or_empty(mask[kGradX], dy, with_width(dy, K)),
          gradient_or_empty(mask[kGradWeight], dy, {N, K}),
          gradient_or_empty(mask[kGradBias], dy, N),
          gradient_or_empty(mask[kGradA], lora_A),
          gradient_or_empty(mask[kGradB], lora_B),
          gradient_or_empty(mask[kGradLoraBias], lora_B, N)};
}

void check_scaling(const char* op, const Tensor& x, const HiddenScale& scaling) {
  if (!scaling.tensor.has_value()) return;
  const Tensor& tensor = *scaling.tensor;
  TORCH_CHECK_VALUE(tensor.dim() == 0 && at::isFloatingType(tensor.scalar_type()), op,
                    ": scaling: got a ", dtype_name(tensor.scalar_type()), " tensor of shape ",
                    tensor.sym_sizes(), ", expected a number or a floating-point 0-d tensor");
  TORCH_CHECK_VALUE(!tensor.requires_grad(), op,
                    ": scaling: got a tensor that requires grad, expected a constant; "
                    "multiply lora_B by it to train it, or detach it");
  check_device(op, "scaling", tensor, x);
}

void check_lora_dropout(const char* op, const Tensor& x, const LoraDropout& dropout) {
  if (!dropout.enabled()) return;
  TORCH_CHECK_VALUE(dropout.rng_state.has_value(), op, ": rng_state: got None with dropout_p ",
                    dropout.p, ", expected an int64 tensor [2] from draw_rng_state(x)");
  check_device(op, "rng_state", *dropout.rng_state, x);
  check_rng_state(op, *dropout.rng_state);
}

void check_scaling_and_dropout(const char* op, const Tensor& x, const HiddenScale& scaling,
                               const LoraDropout& dropout) {
  check_dropout_p(op, dropout.p);
  check_scaling(op, x, scaling);
  check_lora_dropout(op, x, dropout);
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight, const c10::SymInt& K) {
  check_device(op, "weight", weight, x);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == K, op, ": weight: got shape ",
                    weight.sym_sizes(), ", expected [out_features, ", K,
                    "], in_features being the input's last dimension");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": weight: got dtype ",
                   dtype_name(weight.scalar_type()), ", expected the input's ",
                   dtype_name(x.scalar_type()),
                   "; convert one of them with .to(), or use torch.autocast");
}

}  // namespace

void check_lora_linear_input(const Tensor& x, c10::SymIntArrayRef weight, const Tensor& lora_A,
                             const char* op) {
  check_dense(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x: got a 0-d tensor, expected [..., in_features]");
  check_base_dtype(op, "x", x);
  const bool others_agree =
      weight.size() == 2 && lora_A.dim() == 2 && weight[1] == lora_A.sym_size(1);
  TORCH_CHECK_VALUE(!others_agree || x.sym_size(-1) == weight[1], op, ": x: got shape ",
                    x.sym_sizes(), ", expected [..., ", weight[1],
                    "], in_features being the second dimension of weight and lora_A");
}

void check_lora_linear_adapter(const LoraLinearCall& call, const c10::SymInt& N, const char* op) {
  const auto& x = call.x;
  check_adapters(op, "x", x, N, x.sym_size(-1), call.lora_A, call.lora_B);
  check_vector(op, "bias", call.bias, x, N, x.scalar_type());
  check_vector(op, "lora_bias", call.lora_bias, x, N, call.lora_B.scalar_type());
  check_scaling_and_dropout(op, x, call.scaling, call.dropout);
}

void check_lora_linear(const LoraLinearCall& call, const char* op) {
  const auto &x = call.x, &weight = call.weight;
  check_lora_linear_input(x, weight.sym_sizes(), call.lora_A, op);
  check_weight(op, x, weight, x.sym_size(-1));
  check_lora_linear_adapter(call, weight.sym_size(0), op);
}

void check_lora_linear_bwd(const LoraLinearBackwardCall& call, const GradientMask& mask,
                           const char* op) {
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto &x = call.x, &h = call.h, &weight = call.weight;
  check_dense(op, "dy", dy);
  TORCH_CHECK_VALUE(dy.dim() >= 1, op, ": dy: got a 0-d tensor, expected [..., out_features]");
  check_adapters(op, "dy", dy, dy.sym_size(-1), last_size(lora_A), lora_A, lora_B);
  check_scaling_and_dropout(op, dy, call.scaling, call.dropout);
  TORCH_CHECK_VALUE(!mask[kGradX] || weight.has_value(), op,
                    ": weight: got None, expected [out_features, in_features] for the gradient "
                    "of x");
  TORCH_CHECK_VALUE(!(mask[kGradWeight] || mask[kGradA]) || x.has_value(), op,
                    ": x: got None, expected [..., in_features] for the gradient of weight or "
                    "lora_A");
  TORCH_CHECK_VALUE(!mask[kGradB] || x.has_value() || h.has_value(), op,
                    ": h: got None without x, expected [M, r] for the gradient of lora_B");
  if (weight.has_value()) {
    check_weight(op, dy, *weight, lora_A.sym_size(1));
    TORCH_CHECK_VALUE(weight->sym_size(0) == dy.sym_size(-1), op, ": weight: got shape ",
                      weight->sym_sizes(), ", expected [", dy.sym_size(-1), ", ",
                      lora_A.sym_size(1), "], [out_features, in_features]");
  }
  if (x.has_value()) {
    check_device(op, "x", *x, dy);
    TORCH_CHECK_VALUE(
        x->dim() == dy.dim() && x->sym_size(-1) == lora_A.sym_size(1) &&
            x->sym_sizes().slice(0, x->dim() - 1) == dy.sym_sizes().slice(0, dy.dim() - 1),
        op, ": x: got shape ", x->sym_sizes(), ", expected dy's ", dy.sym_sizes(),
        " with in_features ", lora_A.sym_size(1), " last");
    TORCH_CHECK_TYPE(x->scalar_type() == dy.scalar_type(), op, ": x: got dtype ",
                     dtype_name(x->scalar_type()), ", expected dy's ",
                     dtype_name(dy.scalar_type()));
  }
  if (h.has_value()) {
    check_device(op, "h", *h, dy);
    TORCH_CHECK_VALUE(
        h->dim() == 2 && h->sym_size(1) == lora_A.sym_size(0) && h->sym_size(0) == count_rows(dy),
        op, ": h: got shape ", h->sym_sizes(), ", expected [M, ", lora_A.sym_size(0),
        "] with one row per row of dy");
    const at::ScalarType compute = at::toOpMathType(lora_A.scalar_type());
    TORCH_CHECK_TYPE(h->scalar_type() == compute, op, ": h: got dtype ",
                     dtype_name(h->scalar_type()), ", expected ", dtype_name(compute),
                     ", in which adapters of dtype ", dtype_name(lora_A.scalar_type()),
                     " are summed");
  }
}

Tensor lora_linear(const LoraLinearCall& call) {
  static const Operator<&lora_linear> op("lora_ext::lora_linear");
  return op(call);
}

std::tuple<Tensor, Tensor> lora_linear_fwd(const LoraLinearCall& call, bool return_h) {
  static const Operator<&lora_linear_fwd> op("lora_ext::lora_linear_fwd");
  return op(call, return_h);
}

Gradients lora_linear_bwd(const LoraLinearBackwardCall& call, GradientMask mask) {
  static const Operator<&lora_linear_bwd> op("lora_ext::lora_linear_bwd");
  return op(call, mask);
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
  m.impl("lora_linear_fwd", flat<&lora_linear_fwd_meta>);
  m.impl("lora_linear_bwd", flat<&lora_linear_bwd_meta>);
}

// Backends without kernels of their own; sparse and quantized tensors are refused by the checks.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_fwd", flat<&lora_linear_fwd_composed>);
  m.impl("lora_linear_bwd", flat<&lora_linear_bwd_composed>);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
