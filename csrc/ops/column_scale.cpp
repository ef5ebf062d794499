// column_scale, y = z * scale + bias with one factor per column: schemas, checks, Meta kernels,
// autograd, and the composed form for devices without a kernel of their own.
#include "ops/column_scale.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor column_scale_meta(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  check_column_scale("column_scale", "z", z, scale, bias);
  return z.new_empty_symint(z.sym_sizes());
}

ColumnScaleGradients column_scale_bwd_meta(const Tensor& dy, const OptionalTensor& z,
                                           const Tensor& scale, ColumnScaleMask mask) {
  check_column_scale_bwd(dy, z, scale, mask);
  const auto compute = dy.options().dtype(at::toOpMathType(dy.scalar_type()));
  const c10::SymInt N = dy.sym_size(-1), none = 0;
  return {gradient_or_empty(mask[kGradZ], dy),
          dy.new_empty_symint({mask[kGradScale] ? N : none}, compute),
          dy.new_empty_symint({mask[kGradOffset] ? N : none}, compute)};
}

struct ColumnScale : torch::autograd::Function<ColumnScale> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& scale,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({scale.requires_grad() ? z : Tensor(), scale});
    ctx->saved_data["has_bias"] = bias.has_value();
    if (bias.has_value()) ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    return column_scale(z, scale, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor z = if_defined(saved[0]);
    const Tensor &scale = saved[1], &dy = grad_outputs[0];
    // needs_input_grad counts the tensors that were passed; None has no number.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const ColumnScaleMask mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                               has_bias && ctx->needs_input_grad(2)};
    auto [dz, dscale, dbias] = needs_differentiable_backward(dy)
                                   ? column_scale_bwd_composed(dy, z, scale, mask)
                                   : column_scale_bwd(dy, z, scale, mask);
    variable_list grads(kColumnScaleGradients);
    if (mask[kGradZ]) grads[kGradZ] = dz;
    if (mask[kGradScale]) grads[kGradScale] = dscale.to(scale.scalar_type());
    if (mask[kGradOffset]) {
      const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["bias_dtype"].toInt());
      grads[kGradOffset] = dbias.to(dtype);
    }
    return grads;
  }
};

Tensor column_scale_autograd(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  if (have_tangents(z, scale, bias)) return column_scale_composed(z, scale, bias);
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (z.requires_grad() || scale.requires_grad() || (bias.has_value() && bias->requires_grad()));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return column_scale(z, scale, bias);
  }
  return ColumnScale::apply(z, scale, bias);
}

}  // namespace

Tensor column_scale_composed(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  check_column_scale("column_scale", "z", z, scale, bias);
  const auto compute = at::toOpMathType(z.scalar_type());
  Tensor y = z.to(compute) * scale.to(compute);
  if (bias.has_value()) y = y + bias->to(compute);
  return y.to(z.scalar_type()).contiguous();
}

ColumnScaleGradients column_scale_bwd_composed(const Tensor& dy, const OptionalTensor& z,
                                               const Tensor& scale, ColumnScaleMask mask) {
  check_column_scale_bwd(dy, z, scale, mask);
  const auto compute = at::toOpMathType(dy.scalar_type());
  const Tensor gradient = dy.to(compute);
  const auto sum_rows = [](const Tensor& t) { return flattened(t).sum(0); };
  const Tensor none = at::empty({0}, gradient.options());
  return {mask[kGradZ] ? (gradient * scale.to(compute)).to(dy.scalar_type()).contiguous()
                       : at::empty({0}, dy.options()),
          mask[kGradScale] ? sum_rows(gradient * z->to(compute)) : none,
          mask[kGradOffset] ? sum_rows(gradient) : none};
}

void check_column_scale(const char* op, const char* name, const Tensor& z, const Tensor& scale,
                        const OptionalTensor& bias) {
  check_dense(op, name, z);
  check_base_dtype(op, name, z);
  TORCH_CHECK_VALUE(z.dim() >= 1, op, ": ", name, ": got a 0-d tensor, expected [..., columns]");
  check_factor(op, "scale", scale, z, z.sym_size(-1));
  check_factor(op, "bias", bias, z, z.sym_size(-1));
}

void check_column_scale_bwd(const Tensor& dy, const OptionalTensor& z, const Tensor& scale,
                            const ColumnScaleMask& mask) {
  constexpr const char* op = "column_scale_bwd";
  check_column_scale(op, "dy", dy, scale, std::nullopt);
  TORCH_CHECK_VALUE(!mask[kGradScale] || z.has_value(), op,
                    ": z: got None, expected [..., columns] for the gradient of scale");
  if (!z.has_value()) return;
  check_device(op, "z", *z, dy);
  TORCH_CHECK_VALUE(z->sym_sizes() == dy.sym_sizes(), op, ": z: got shape ", z->sym_sizes(),
                    ", expected dy's ", dy.sym_sizes());
  TORCH_CHECK_TYPE(z->scalar_type() == dy.scalar_type(), op, ": z: got dtype ",
                   dtype_name(z->scalar_type()), ", expected dy's ", dtype_name(dy.scalar_type()));
}

Tensor column_scale(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  static const Operator<&column_scale> op("lora_ext::column_scale");
  return op(z, scale, bias);
}

ColumnScaleGradients column_scale_bwd(const Tensor& dy, const OptionalTensor& z,
                                      const Tensor& scale, ColumnScaleMask mask) {
  static const Operator<&column_scale_bwd> op("lora_ext::column_scale_bwd");
  return op(dy, z, scale, mask);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("column_scale(Tensor z, Tensor scale, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "column_scale_bwd(Tensor dy, Tensor? z, Tensor scale, bool[3] mask) -> "
      "(Tensor dz, Tensor dscale, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("column_scale", &column_scale_meta);
  m.impl("column_scale_bwd", &column_scale_bwd_meta);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("column_scale", &column_scale_composed);
  m.impl("column_scale_bwd", &column_scale_bwd_composed);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("column_scale", &column_scale_composed);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("column_scale", &column_scale_autograd);
  m.impl("column_scale_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
