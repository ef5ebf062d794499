// lora_linear as a torch::autograd::Function.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/dropout.h"
#include "ops/lora_linear.h"
#include "ops/lora_linear_registration.h"
#include "ops/tensors.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool wants_grad(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->requires_grad();
}

// The same gradients out of differentiable ATen operators: what backward() runs where they are
// differentiated or transformed in turn. It holds M x K temporaries.
variable_list differentiable_backward(const Tensor& dy, const OptionalTensor& x,
                                      const OptionalTensor& h, const OptionalTensor& weight,
                                      const Tensor& lora_A, const Tensor& lora_B,
                                      const LoraScale& scale, const GradientMask& mask) {
  const auto compute = at::toOpMathType(dy.scalar_type());
  const Tensor dy_rows = flattened(dy).to(compute);
  const Tensor A = lora_A.to(compute), B = lora_B.to(compute);
  Tensor s = at::scalar_tensor(scale.scaling, dy_rows.options());
  if (scale.scaling_tensor.has_value()) s = s * *scale.scaling_tensor;

  const c10::SymInt M = dy_rows.sym_size(0), K = lora_A.sym_size(1);
  Tensor keep = at::ones({}, dy_rows.options());
  if (scale.dropout_p > 0.0) {
    const double survivor = scale.dropout_p < 1.0 ? 1.0 / (1.0 - scale.dropout_p) : 0.0;
    keep = dropout_mask(*scale.rng_state, M, K, scale.dropout_p).to(compute) * survivor;
  }
  const Tensor x_rows = x.has_value() ? flattened(*x).to(compute) : Tensor();
  const Tensor dh = at::mm(dy_rows, B) * s;

  variable_list grads(kGradients);
  if (mask[kGradX]) {
    const Tensor dx = at::mm(dy_rows, weight->to(compute)) + at::mm(dh, A) * keep;
    auto sizes = dy.sym_sizes().vec();
    sizes.back() = K;
    grads[kGradX] = dx.reshape_symint(sizes).to(dy.scalar_type());
  }
  if (mask[kGradWeight]) grads[kGradWeight] = at::mm(dy_rows.t(), x_rows).to(dy.scalar_type());
  if (mask[kGradBias]) grads[kGradBias] = dy_rows.sum(0).to(dy.scalar_type());
  if (mask[kGradA]) grads[kGradA] = at::mm(dh.t(), x_rows * keep).to(lora_A.scalar_type());
  if (mask[kGradB]) {
    const Tensor hidden = x.has_value() ? at::mm(x_rows * keep, A.t()) : h->to(compute);
    grads[kGradB] = (at::mm(dy_rows.t(), hidden) * s).to(lora_B.scalar_type());
  }
  if (mask[kGradLoraBias]) grads[kGradLoraBias] = (dy_rows.sum(0) * s).to(lora_B.scalar_type());
  return grads;
}

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& lora_A, const Tensor& lora_B,
                        const OptionalTensor& lora_bias, double scaling,
                        const OptionalTensor& scaling_tensor, double dropout_p,
                        const OptionalTensor& rng_state) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LoraScale scale{scaling, scaling_tensor, dropout_p, rng_state};
    // Backward reads x for the gradients of weight and lora_A, and h for that of lora_B. Under
    // dropout it makes the dropped x again anyway, in cache, and h from it costs one product: then
    // h is kept only where x is not.
    const bool save_x = weight.requires_grad() || lora_A.requires_grad();
    const bool save_h = lora_B.requires_grad() && !(save_x && dropout_p > 0.0);
    auto [y, h] = lora_linear_fwd(x, weight, bias, lora_A, lora_B, lora_bias, scale, save_h);
    ctx->save_for_backward({save_x ? x : Tensor(), save_h ? h : Tensor(),
                            x.requires_grad() ? weight : Tensor(), lora_A, lora_B,
                            scaling_tensor.value_or(Tensor()),
                            dropout_p > 0.0 ? rng_state.value_or(Tensor()) : Tensor()});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    // needs_input_grad counts the tensors that were passed; None has no number.
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["has_lora_bias"] = lora_bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = if_defined(saved[0]), h = if_defined(saved[1]),
                         weight = if_defined(saved[2]);
    const Tensor &lora_A = saved[3], &lora_B = saved[4], &dy = grad_outputs[0];
    const LoraScale scale{ctx->saved_data["scaling"].toDouble(), if_defined(saved[5]),
                          ctx->saved_data["dropout_p"].toDouble(), if_defined(saved[6])};
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool has_lora_bias = ctx->saved_data["has_lora_bias"].toBool();
    size_t input = 0;
    const auto next = [&](bool present) { return present && ctx->needs_input_grad(input++); };
    GradientMask mask;
    mask[kGradX] = next(true);
    mask[kGradWeight] = next(true);
    mask[kGradBias] = next(has_bias);
    mask[kGradA] = next(true);
    mask[kGradB] = next(true);
    mask[kGradLoraBias] = next(has_lora_bias);

    variable_list grads;
    if (needs_differentiable_backward(dy)) {
      const bool x_requires_grad = weight.has_value();  // which is what weight was kept for
      TORCH_CHECK(
          !(at::GradMode::is_enabled() && mask[kGradB] && x_requires_grad && !x.has_value()),
          "lora_linear: double backward: x was not kept, since lora_A and weight are "
          "frozen; let lora_A require grad to differentiate twice");
      grads = differentiable_backward(dy, x, h, weight, lora_A, lora_B, scale, mask);
    } else {
      auto [dx, dweight, dbias, dA, dB, dlora_bias] =
          lora_linear_bwd(dy, x, h, weight, lora_A, lora_B, scale, mask);
      grads = {dx, dweight, dbias, dA, dB, dlora_bias};
      for (size_t i = 0; i < grads.size(); ++i) {
        if (!mask[i]) grads[i] = Tensor();
      }
    }
    grads.resize(10);  // scaling, scaling_tensor, dropout_p, rng_state: no gradient
    return grads;
  }
};

Tensor lora_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& lora_A, const Tensor& lora_B,
                            const OptionalTensor& lora_bias, double scaling,
                            const OptionalTensor& scaling_tensor, double dropout_p,
                            const OptionalTensor& rng_state) {
  if (have_tangents(x, weight, bias, lora_A, lora_B, lora_bias, scaling_tensor)) {
    return lora_linear_decomposed(x, weight, bias, lora_A, lora_B, lora_bias, scaling,
                                  scaling_tensor, dropout_p, rng_state);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || weight.requires_grad() || wants_grad(bias) || lora_A.requires_grad() ||
       lora_B.requires_grad() || wants_grad(lora_bias));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(lora_linear_fwd(x, weight, bias, lora_A, lora_B, lora_bias,
                                       {scaling, scaling_tensor, dropout_p, rng_state}, false));
  }
  return LoraLinear::apply(x, weight, bias, lora_A, lora_B, lora_bias, scaling, scaling_tensor,
                           dropout_p, rng_state);
}

}  // namespace

Tensor lora_linear_decomposed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& lora_A, const Tensor& lora_B,
                              const OptionalTensor& lora_bias, double scaling,
                              const OptionalTensor& scaling_tensor, double dropout_p,
                              const OptionalTensor& rng_state) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, lora_bias,
                    {scaling, scaling_tensor, dropout_p, rng_state});
  const Tensor d = dropout_p > 0.0 ? dropout(x, *rng_state, dropout_p) : x;
  Tensor update =
      at::linear(at::linear(d.to(lora_A.scalar_type()), lora_A), lora_B, lora_bias) * scaling;
  if (scaling_tensor.has_value()) update = update * *scaling_tensor;
  return at::linear(x, weight, bias) + update.to(x.scalar_type());
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("lora_linear", &lora_linear_autograd); }

// Under inference mode tensors carry no Autograd key: the same function, its first branch.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl(
      "lora_linear",
      [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
         const Tensor& lora_B, const OptionalTensor& lora_bias, double scaling,
         const OptionalTensor& scaling_tensor, double dropout_p, const OptionalTensor& rng_state) {
        return std::get<0>(lora_linear_fwd(x, weight, bias, lora_A, lora_B, lora_bias,
                                           {scaling, scaling_tensor, dropout_p, rng_state}, false));
      });
}

}  // namespace lora_ext
