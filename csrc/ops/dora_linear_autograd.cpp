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
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The same gradients out of differentiable ATen operators: what backward() runs where they are
// differentiated or transformed in turn. It holds M x K temporaries.
variable_list dora_linear_bwd_decomposed(const DoraLinearBackwardCall& call, const DoraMask& mask) {
  const auto &dy = call.dy, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto compute = at::toOpMathType(dy.scalar_type());
  const Tensor dy_rows = flattened(dy).to(compute);
  const c10::SymInt M = dy_rows.sym_size(0), K = lora_A.sym_size(1);
  const Tensor A = lora_A.to(compute), B = lora_B.to(compute), g = call.scale.to(compute);
  const Tensor ones = at::ones_symint({M, K}, dy_rows.options());
  const Tensor keep = dropout(ones, call.rng_state, call.dropout_p);
  const Tensor d = call.x.has_value() ? flattened(*call.x).to(compute) * keep : Tensor();
  const Tensor dh = at::mm(dy_rows, B) * call.scaling;

  variable_list grads(kDoraGradients);
  if (mask[kDoraX]) {
    const Tensor W = call.weight->to(compute);
    const Tensor dd = at::mm(dy_rows * (g - 1), W) + at::mm(dh, A);
    const Tensor dx = at::mm(dy_rows, W) + dd * keep;
    grads[kDoraX] = dx.reshape_symint(with_width(dy, K)).to(dy.scalar_type());
  }
  if (mask[kDoraBias]) grads[kDoraBias] = dy_rows.sum(0).to(dy.scalar_type());
  if (mask[kDoraA]) grads[kDoraA] = at::mm(dh.t(), d).to(lora_A.scalar_type());
  if (mask[kDoraB]) {
    grads[kDoraB] = (at::mm(dy_rows.t(), at::mm(d, A.t())) * call.scaling).to(lora_B.scalar_type());
  }
  if (mask[kDoraScale]) {
    // weight is kept where x requires grad: elsewhere v is a constant.
    const Tensor product = call.weight.has_value() ? at::mm(d, call.weight->to(compute).t())
                                                   : flattened(*call.v).to(compute);
    grads[kDoraScale] = (dy_rows * product).sum(0);
  }
  return grads;
}

struct DoraLinear : torch::autograd::Function<DoraLinear> {
  static constexpr bool is_traceable = true;

  // Each field of a DoraLinearCall, since autograd looks for tensors among the arguments.
  template <class... Fields>
  static Tensor forward(AutogradContext* ctx, const Fields&... fields) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const DoraLinearCall call{fields...};
    auto [y, v] = dora_linear_fwd(call);
    // scale too: its second derivatives with x read x.
    const bool scale_grad = call.scale.requires_grad();
    const bool save_x = call.lora_A.requires_grad() || call.lora_B.requires_grad() || scale_grad;
    ctx->save_for_backward({save_x ? call.x : Tensor(), scale_grad ? v : Tensor(),
                            call.x.requires_grad() ? call.weight : Tensor(), call.lora_A,
                            call.lora_B, call.scale, call.rng_state});
    ctx->saved_data["scaling"] = call.scaling;
    ctx->saved_data["dropout_p"] = call.dropout_p;
    ctx->saved_data["has_bias"] = call.bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = if_defined(saved[0]), v = if_defined(saved[1]),
                         weight = if_defined(saved[2]);
    const DoraLinearBackwardCall call{grad_outputs[0],
                                      x,
                                      v,
                                      weight,
                                      saved[3],
                                      saved[4],
                                      saved[5],
                                      ctx->saved_data["scaling"].toDouble(),
                                      ctx->saved_data["dropout_p"].toDouble(),
                                      saved[6]};
    // needs_input_grad counts the tensors that were passed; None has no number.
    const size_t bias = ctx->saved_data["has_bias"].toBool() ? 1 : 0;
    DoraMask mask;
    mask[kDoraX] = ctx->needs_input_grad(0);
    mask[kDoraBias] = bias && ctx->needs_input_grad(2);
    mask[kDoraA] = ctx->needs_input_grad(2 + bias);
    mask[kDoraB] = ctx->needs_input_grad(3 + bias);
    mask[kDoraScale] = ctx->needs_input_grad(4 + bias);

    variable_list grads;
    if (needs_differentiable_backward(call.dy)) {
      grads = dora_linear_bwd_decomposed(call, mask);
    } else {
      auto [dx, dbias, dA, dB, dscale] = dora_linear_bwd(call, mask);
      grads = {dx, dbias, dA, dB, dscale};
    }
    const auto gradient = [&](DoraGradient i) { return mask[i] ? grads[i] : Tensor(); };
    const Tensor dscale =
        mask[kDoraScale] ? grads[kDoraScale].to(call.scale.scalar_type()) : Tensor();
    variable_list result{gradient(kDoraX), Tensor(),         gradient(kDoraBias),
                         gradient(kDoraA), gradient(kDoraB), dscale};
    result.resize(kFields<DoraLinearCall>);  // the last ones have no gradient, nor has the weight
    return result;
  }
};

// Out of operators that are differentiable in everything, in both modes.
Tensor dora_linear_decomposed(const DoraLinearCall& call) {
  check_dora_linear(call);
  const auto& x = call.x;
  const Tensor v = at::linear(dropout(x, call.rng_state, call.dropout_p), call.weight);
  const Tensor g = call.scale.to(at::toOpMathType(x.scalar_type()));
  return lora_linear(call.lora_linear()) + column_scale(v, g - 1, std::nullopt);
}

Tensor dora_linear_autograd(const DoraLinearCall& call) {
  const auto &x = call.x, &weight = call.weight, &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto& bias = call.bias;
  if ((at::GradMode::is_enabled() && weight.requires_grad()) ||
      have_tangents(x, weight, bias, lora_A, lora_B, call.scale)) {
    return dora_linear_decomposed(call);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || (bias.has_value() && bias->requires_grad()) || lora_A.requires_grad() ||
       lora_B.requires_grad() || call.scale.requires_grad());
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(dora_linear_fwd(call));
  }
  return std::apply([](const auto&... fields) { return DoraLinear::apply(fields...); },
                    call.fields());
}

// Under inference mode tensors carry no Autograd key.
Tensor dora_linear_inference(const DoraLinearCall& call) {
  return std::get<0>(dora_linear_fwd(call));
}

// As lora_linear under autocast: float adapters, and the scale, stay as they are.
template <c10::DeviceType kDevice>
Tensor dora_linear_autocast(const DoraLinearCall& call) {
  const AutocastScope<kDevice> cast;
  return dora_linear({cast.base(call.x), cast.base(call.weight), cast.base(call.bias),
                      cast.adapter(call.lora_A), cast.adapter(call.lora_B), call.scale,
                      call.scaling, call.dropout_p, call.rng_state});
}

// torch.func's transforms come before autocast.
Tensor dora_linear_functorch(const DoraLinearCall& call) {
  const auto op = !is_autocast_on(call.x) ? &dora_linear_decomposed
                  : call.x.is_cuda()      ? &dora_linear_autocast<c10::DeviceType::CUDA>
                                          : &dora_linear_autocast<c10::DeviceType::CPU>;
  return op(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("dora_linear", flat<&dora_linear_autograd>); }

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("dora_linear", flat<&dora_linear_inference>);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("dora_linear", flat<&dora_linear_functorch>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("dora_linear", flat<&dora_linear_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("dora_linear", flat<&dora_linear_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
