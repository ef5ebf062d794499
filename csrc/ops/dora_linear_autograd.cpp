// dora_linear as a torch::autograd::Function, under torch.autocast, and under torch.func's
// transforms.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/column_scale.h"
#include "ops/dora_linear.h"
#include "ops/dropout.h"
#include "ops/operator.h"
#include "ops/tensors.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> dora_linear_fwd(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& lora_A,
                                           const Tensor& lora_B, const Tensor& scale,
                                           double scaling, double dropout_p,
                                           const Tensor& rng_state) {
  static const auto op = find_op<DoraLinearFwdSignature>("lora_ext::dora_linear_fwd");
  return op.call(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
}

// The same gradients out of differentiable ATen operators: what backward() runs where they are
// differentiated or transformed in turn. It holds M x K temporaries.
variable_list differentiable_backward(const Tensor& dy, const OptionalTensor& x,
                                      const OptionalTensor& v, const OptionalTensor& weight,
                                      const Tensor& lora_A, const Tensor& lora_B,
                                      const Tensor& scale, const LoraScale& lora_scale,
                                      const DoraMask& mask) {
  const auto compute = at::toOpMathType(dy.scalar_type());
  const Tensor dy_rows = flattened(dy).to(compute);
  const c10::SymInt M = dy_rows.sym_size(0), K = lora_A.sym_size(1);
  const Tensor A = lora_A.to(compute), B = lora_B.to(compute), g = scale.to(compute);
  const Tensor ones = at::ones_symint({M, K}, dy_rows.options());
  const Tensor keep = dropout(ones, *lora_scale.rng_state, lora_scale.dropout_p);
  const Tensor d = x.has_value() ? flattened(*x).to(compute) * keep : Tensor();
  const Tensor dh = at::mm(dy_rows, B) * lora_scale.scaling;

  variable_list grads(kDoraGradients);
  if (mask[kDoraX]) {
    const Tensor W = weight->to(compute);
    const Tensor dd = at::mm(dy_rows * (g - 1), W) + at::mm(dh, A);
    auto sizes = dy.sym_sizes().vec();
    sizes.back() = K;
    grads[kDoraX] = (at::mm(dy_rows, W) + dd * keep).reshape_symint(sizes).to(dy.scalar_type());
  }
  if (mask[kDoraBias]) grads[kDoraBias] = dy_rows.sum(0).to(dy.scalar_type());
  if (mask[kDoraA]) grads[kDoraA] = at::mm(dh.t(), d).to(lora_A.scalar_type());
  if (mask[kDoraB]) {
    grads[kDoraB] =
        (at::mm(dy_rows.t(), at::mm(d, A.t())) * lora_scale.scaling).to(lora_B.scalar_type());
  }
  if (mask[kDoraScale]) {
    // weight is kept where x requires grad: elsewhere v is a constant.
    const Tensor product =
        weight.has_value() ? at::mm(d, weight->to(compute).t()) : flattened(*v).to(compute);
    grads[kDoraScale] = (dy_rows * product).sum(0);
  }
  return grads;
}

struct DoraLinear : torch::autograd::Function<DoraLinear> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& lora_A, const Tensor& lora_B,
                        const Tensor& scale, double scaling, double dropout_p,
                        const Tensor& rng_state) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, v] =
        dora_linear_fwd(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
    // scale too: its second derivatives with x read x.
    const bool save_x = lora_A.requires_grad() || lora_B.requires_grad() || scale.requires_grad();
    ctx->save_for_backward({save_x ? x : Tensor(), scale.requires_grad() ? v : Tensor(),
                            x.requires_grad() ? weight : Tensor(), lora_A, lora_B, scale,
                            rng_state});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<DoraLinearBwdSignature>("lora_ext::dora_linear_bwd");
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = if_defined(saved[0]), v = if_defined(saved[1]),
                         weight = if_defined(saved[2]);
    const Tensor &lora_A = saved[3], &lora_B = saved[4], &scale = saved[5], &rng_state = saved[6];
    const Tensor& dy = grad_outputs[0];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    // needs_input_grad counts the tensors that were passed; None has no number.
    const size_t bias = ctx->saved_data["has_bias"].toBool() ? 1 : 0;
    DoraMask mask;
    mask[kDoraX] = ctx->needs_input_grad(0);
    mask[kDoraBias] = bias && ctx->needs_input_grad(2);
    mask[kDoraA] = ctx->needs_input_grad(2 + bias);
    mask[kDoraB] = ctx->needs_input_grad(3 + bias);
    mask[kDoraScale] = ctx->needs_input_grad(4 + bias);

    variable_list grads;
    if (needs_differentiable_backward(dy)) {
      const LoraScale lora_scale{scaling, std::nullopt, dropout_p, rng_state};
      grads = differentiable_backward(dy, x, v, weight, lora_A, lora_B, scale, lora_scale, mask);
    } else {
      auto [dx, dbias, dA, dB, dscale] =
          op.call(dy, x, v, weight, lora_A, lora_B, scale, scaling, dropout_p, rng_state, mask);
      grads = {dx, dbias, dA, dB, dscale};
    }
    const auto gradient = [&](DoraGradient i) { return mask[i] ? grads[i] : Tensor(); };
    const Tensor dscale = mask[kDoraScale] ? grads[kDoraScale].to(scale.scalar_type()) : Tensor();
    // Of weight, which is frozen, scaling, dropout_p and rng_state there is none.
    return {gradient(kDoraX), Tensor(),         gradient(kDoraBias),
            gradient(kDoraA), gradient(kDoraB), dscale,
            Tensor(),         Tensor(),         Tensor()};
  }
};

// Out of operators that are differentiable in everything, in both modes.
Tensor dora_linear_decomposed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                              double scaling, double dropout_p, const Tensor& rng_state) {
  const LoraScale lora_scale{scaling, std::nullopt, dropout_p, rng_state};
  check_dora_linear(x, weight, bias, lora_A, lora_B, scale, lora_scale);
  const Tensor v = at::linear(dropout(x, rng_state, dropout_p), weight);
  const Tensor g = scale.to(at::toOpMathType(x.scalar_type()));
  return lora_linear(x, weight, bias, lora_A, lora_B, std::nullopt, lora_scale) +
         column_scale(v, g - 1, std::nullopt);
}

Tensor dora_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                            double scaling, double dropout_p, const Tensor& rng_state) {
  if ((at::GradMode::is_enabled() && weight.requires_grad()) ||
      have_tangents(x, weight, bias, lora_A, lora_B, scale)) {
    return dora_linear_decomposed(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p,
                                  rng_state);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || (bias.has_value() && bias->requires_grad()) || lora_A.requires_grad() ||
       lora_B.requires_grad() || scale.requires_grad());
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(
        dora_linear_fwd(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state));
  }
  return DoraLinear::apply(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
}

// As lora_linear under autocast: float adapters, and the scale, stay as they are.
template <c10::DeviceType kDevice>
Tensor dora_linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                            double scaling, double dropout_p, const Tensor& rng_state) {
  static const auto op = find_op<DoraLinearSignature>("lora_ext::dora_linear");
  const AutocastScope<kDevice> cast;
  return op.call(cast.base(x), cast.base(weight), cast.base(bias), cast.adapter(lora_A),
                 cast.adapter(lora_B), scale, scaling, dropout_p, rng_state);
}

// torch.func's transforms come before autocast.
Tensor dora_linear_functorch(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                             double scaling, double dropout_p, const Tensor& rng_state) {
  const auto op = !is_autocast_on(x) ? &dora_linear_decomposed
                  : x.is_cuda()      ? &dora_linear_autocast<c10::DeviceType::CUDA>
                                     : &dora_linear_autocast<c10::DeviceType::CPU>;
  return op(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("dora_linear", &dora_linear_functorch);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("dora_linear", &dora_linear_autograd); }

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("dora_linear", &dora_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("dora_linear", &dora_linear_autocast<c10::DeviceType::CUDA>);
}

// Under inference mode tensors carry no Autograd key.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("dora_linear", [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                           double scaling, double dropout_p, const Tensor& rng_state) {
    return std::get<0>(
        dora_linear_fwd(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state));
  });
}

}  // namespace lora_ext
