// lora_linear as a torch::autograd::Function, under torch.autocast, and under torch.func's
// transforms.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/dropout.h"
#include "ops/lora_linear.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool wants_grad(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->requires_grad();
}

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static constexpr bool is_traceable = true;

  // Each field of a LoraLinearCall, since autograd looks for tensors among the arguments.
  template <class... Fields>
  static Tensor forward(AutogradContext* ctx, const Fields&... fields) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LoraLinearCall call{fields...};
    // Backward reads x for the gradients of weight and lora_A, and h for that of lora_B. Under
    // dropout it makes dropout(x) again anyway. On a CPU in cache, and h from it costs one product:
    // then h is kept only where x is not. On a GPU h would be one more pass over x.
    const bool save_x = call.weight.requires_grad() || call.lora_A.requires_grad();
    const bool makes_h = save_x && call.dropout.enabled() && !call.x.is_cuda();
    const bool save_h = call.lora_B.requires_grad() && !makes_h;
    auto [y, h] = lora_linear_fwd(call, save_h);
    ctx->save_for_backward(
        {save_x ? call.x : Tensor(), save_h ? h : Tensor(),
         call.x.requires_grad() ? call.weight : Tensor(), call.lora_A, call.lora_B,
         call.scaling.tensor.value_or(Tensor()),
         call.dropout.enabled() ? call.dropout.rng_state.value_or(Tensor()) : Tensor()});
    ctx->saved_data["scaling"] = call.scaling.number;
    ctx->saved_data["dropout_p"] = call.dropout.p;
    // needs_input_grad counts the tensors that were passed; None has no number.
    ctx->saved_data["has_bias"] = call.bias.has_value();
    ctx->saved_data["has_lora_bias"] = call.lora_bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = if_defined(saved[0]), h = if_defined(saved[1]),
                         weight = if_defined(saved[2]);
    const LoraLinearBackwardCall call{
        grad_outputs[0],
        x,
        h,
        weight,
        saved[3],
        saved[4],
        {ctx->saved_data["scaling"].toDouble(), if_defined(saved[5])},
        {ctx->saved_data["dropout_p"].toDouble(), if_defined(saved[6])}};
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
    if (needs_differentiable_backward(call.dy)) {
      const bool x_requires_grad = weight.has_value();  // which is what weight was kept for
      TORCH_CHECK(
          !(at::GradMode::is_enabled() && mask[kGradB] && x_requires_grad && !x.has_value()),
          "lora_linear: double backward: x was not kept, since lora_A and weight are "
          "frozen; let lora_A require grad to differentiate twice");
      grads = lora_linear_bwd_decomposed(call, mask);
    } else {
      auto [dx, dweight, dbias, dA, dB, dlora_bias] = lora_linear_bwd(call, mask);
      grads = {dx, dweight, dbias, dA, dB, dlora_bias};
      for (size_t i = 0; i < grads.size(); ++i) {
        if (!mask[i]) grads[i] = Tensor();
      }
    }
    grads.resize(kFields<LoraLinearCall>);  // the last ones have no gradient
    return grads;
  }
};

// Out of ATen's operators, with their roundings (see transforms.h).
Tensor lora_linear_decomposed(const LoraLinearCall& call) {
  check_lora_linear(call);
  const Tensor &x = call.x, &lora_A = call.lora_A;
  const Tensor d = call.dropout.enabled() ? dropout(x, *call.dropout.rng_state, call.dropout.p) : x;
  const Tensor h = at::linear(d.to(lora_A.scalar_type()), lora_A);
  const Tensor update = call.scaling.times(at::linear(h, call.lora_B, call.lora_bias));
  return at::linear(x, call.weight, call.bias) + update.to(x.scalar_type());
}

Tensor lora_linear_autograd(const LoraLinearCall& call) {
  const auto& [x, weight, bias, lora_A, lora_B, lora_bias, scaling, dropout] = call;
  if (have_tangents(x, weight, bias, lora_A, lora_B, lora_bias, scaling.tensor)) {
    return lora_linear_decomposed(call);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || weight.requires_grad() || wants_grad(bias) || lora_A.requires_grad() ||
       lora_B.requires_grad() || wants_grad(lora_bias));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(lora_linear_fwd(call, false));
  }
  return std::apply([](const auto&... fields) { return LoraLinear::apply(fields...); },
                    call.fields());
}

// Under inference mode tensors carry no Autograd key.
Tensor lora_linear_inference(const LoraLinearCall& call) {
  return std::get<0>(lora_linear_fwd(call, false));
}

template <c10::DeviceType kDevice>
Tensor lora_linear_autocast(const LoraLinearCall& call) {
  const AutocastScope<kDevice> cast;
  return lora_linear({cast.base(call.x), cast.base(call.weight), cast.base(call.bias),
                      cast.adapter(call.lora_A), cast.adapter(call.lora_B),
                      cast.adapter(call.lora_bias), call.scaling, call.dropout});
}

// torch.func's transforms come before autocast.
Tensor lora_linear_functorch(const LoraLinearCall& call) {
  const auto op = !is_autocast_on(call.x) ? &lora_linear_decomposed
                  : call.x.is_cuda()      ? &lora_linear_autocast<c10::DeviceType::CUDA>
                                          : &lora_linear_autocast<c10::DeviceType::CPU>;
  return op(call);
}

}  // namespace

TensorVector lora_linear_bwd_decomposed(const LoraLinearBackwardCall& call,
                                        const GradientMask& mask) {
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto compute = at::toOpMathType(dy.scalar_type());
  const Tensor dy_rows = flattened(dy).to(compute);
  const Tensor A = lora_A.to(compute), B = lora_B.to(compute);
  const Tensor s = call.scaling.times(at::ones({}, dy_rows.options()));

  const c10::SymInt M = dy_rows.sym_size(0), K = lora_A.sym_size(1);
  Tensor keep = at::ones({}, dy_rows.options());
  if (call.dropout.enabled()) {
    keep = dropout_mask(*call.dropout.rng_state, M, K, call.dropout.p).to(compute) *
           call.dropout.survivor();
  }
  const Tensor x_rows = call.x.has_value() ? flattened(*call.x).to(compute) : Tensor();
  const Tensor dh = at::mm(dy_rows, B) * s;

  TensorVector grads(kGradients);
  if (mask[kGradX]) {
    const Tensor dx = at::mm(dy_rows, call.weight->to(compute)) + at::mm(dh, A) * keep;
    grads[kGradX] = dx.reshape_symint(with_width(dy, K)).to(dy.scalar_type());
  }
  if (mask[kGradWeight]) grads[kGradWeight] = at::mm(dy_rows.t(), x_rows).to(dy.scalar_type());
  if (mask[kGradBias]) grads[kGradBias] = dy_rows.sum(0).to(dy.scalar_type());
  if (mask[kGradA]) grads[kGradA] = at::mm(dh.t(), x_rows * keep).to(lora_A.scalar_type());
  if (mask[kGradB]) {
    const Tensor hidden = call.x.has_value() ? at::mm(x_rows * keep, A.t()) : call.h->to(compute);
    grads[kGradB] = (at::mm(dy_rows.t(), hidden) * s).to(lora_B.scalar_type());
  }
  if (mask[kGradLoraBias]) grads[kGradLoraBias] = (dy_rows.sum(0) * s).to(lora_B.scalar_type());
  return grads;
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("lora_linear", flat<&lora_linear_autograd>); }

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", flat<&lora_linear_inference>);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_linear", flat<&lora_linear_functorch>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear", flat<&lora_linear_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear", flat<&lora_linear_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
