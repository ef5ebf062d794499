// lora_linear_quantized as a torch::autograd::Function, under torch.autocast, and under
// torch.func's transforms.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/lora_linear_quantized.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool trains(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

struct LoraLinearQuantized : torch::autograd::Function<LoraLinearQuantized> {
  static constexpr bool is_traceable = true;

  template <class... Fields>
  static Tensor forward(AutogradContext* ctx, const Fields&... fields) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LoraLinearQuantizedCall call{fields...};
    // As lora_linear beside a frozen weight; of the weight its own tensors, as they are.
    const bool save_x = call.lora_A.requires_grad();
    const bool makes_h = save_x && call.dropout.enabled() && !call.x.is_cuda();
    const bool save_h = call.lora_B.requires_grad() && !makes_h;
    auto [y, h] = lora_linear_quantized_fwd(call, save_h);
    variable_list saved = {
        save_x ? call.x : Tensor(),
        save_h ? h : Tensor(),
        call.lora_A,
        call.lora_B,
        call.scaling.tensor.value_or(Tensor()),
        call.dropout.enabled() ? call.dropout.rng_state.value_or(Tensor()) : Tensor()};
    if (call.x.requires_grad()) {
      saved.insert(saved.end(), call.weight.tensors.begin(), call.weight.tensors.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["layout"] = call.weight.layout.vec();
    ctx->saved_data["numbers"] = call.weight.numbers.vec();
    ctx->saved_data["scaling"] = call.scaling.number;
    ctx->saved_data["dropout_p"] = call.dropout.p;
    // needs_input_grad counts the tensors that were passed; None has no number.
    ctx->saved_data["weight_tensors"] = static_cast<int64_t>(call.weight.tensors.size());
    ctx->saved_data["has_bias"] = call.bias.has_value();
    ctx->saved_data["has_lora_bias"] = call.lora_bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto layout = ctx->saved_data["layout"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const OptionalTensor x = if_defined(saved[0]), h = if_defined(saved[1]);
    constexpr size_t kWeight = 6;  // of `saved`: the rest is the weight's
    const at::TensorList tensors = at::TensorList(saved).slice(kWeight);
    const LoraLinearQuantizedBackwardCall call{
        grad_outputs[0],
        x,
        h,
        {tensors, layout, numbers},
        saved[2],
        saved[3],
        {ctx->saved_data["scaling"].toDouble(), if_defined(saved[4])},
        {ctx->saved_data["dropout_p"].toDouble(), if_defined(saved[5])}};
    const auto count = static_cast<size_t>(ctx->saved_data["weight_tensors"].toInt());
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool has_lora_bias = ctx->saved_data["has_lora_bias"].toBool();
    size_t input = 0;
    const auto next = [&](bool present) { return present && ctx->needs_input_grad(input++); };
    QuantizedMask mask;
    mask[0] = next(true);
    input += count;
    mask[1] = next(has_bias);
    mask[2] = next(true);
    mask[3] = next(true);
    mask[4] = next(has_lora_bias);

    variable_list found;
    if (needs_differentiable_backward(call.dy)) {
      const bool x_requires_grad = !tensors.empty();  // which is what they were kept for
      TORCH_CHECK(
          !(at::GradMode::is_enabled() && mask[3] && x_requires_grad && !x.has_value()),
          "lora_linear_quantized: double backward: x was not kept, since lora_A is frozen; let "
          "lora_A require grad to differentiate twice");
      const auto fields = check_lora_linear_quantized_bwd(call, mask);
      OptionalTensor weight;
      if (fields.has_value()) weight = dequantized(*fields, call.dy.scalar_type());
      found = lora_linear_bwd_decomposed(call.with(weight), with_weight(mask));
      found.erase(found.begin() + kGradWeight);
    } else {
      auto [dx, dbias, dA, dB, dlora_bias] = lora_linear_quantized_bwd(call, mask);
      found = {dx, dbias, dA, dB, dlora_bias};
    }
    for (size_t i = 0; i < found.size(); ++i) {
      if (!mask[i]) found[i] = Tensor();
    }
    // x, the weight's tensors, layout and numbers, and the others
    variable_list grads(kFields<LoraLinearQuantizedCall> - 1 + count);
    grads[0] = found[0];
    for (size_t i = 1; i < found.size(); ++i) grads[count + 2 + i] = found[i];
    return grads;
  }
};

Tensor lora_linear_quantized_autograd(const LoraLinearQuantizedCall& call) {
  const auto& [x, weight, bias, lora_A, lora_B, lora_bias, scaling, dropout] = call;
  if (have_tangents(x, bias, lora_A, lora_B, lora_bias, scaling.tensor)) {
    const QuantizedFields fields = check_lora_linear_quantized(call);
    return lora_linear(call.with(dequantized(fields, x.scalar_type())));
  }
  const bool differentiate =
      at::GradMode::is_enabled() && (x.requires_grad() || trains(bias) || lora_A.requires_grad() ||
                                     lora_B.requires_grad() || trains(lora_bias));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(lora_linear_quantized_fwd(call, false));
  }
  return std::apply([](const auto&... fields) { return LoraLinearQuantized::apply(fields...); },
                    call.fields());
}

// Under inference mode tensors carry no Autograd key.
Tensor lora_linear_quantized_inference(const LoraLinearQuantizedCall& call) {
  return std::get<0>(lora_linear_quantized_fwd(call, false));
}

template <c10::DeviceType kDevice>
Tensor lora_linear_quantized_autocast(const LoraLinearQuantizedCall& call) {
  const AutocastScope<kDevice> cast;
  return lora_linear_quantized({cast.base(call.x), call.weight, cast.base(call.bias),
                                cast.adapter(call.lora_A), cast.adapter(call.lora_B),
                                cast.adapter(call.lora_bias), call.scaling, call.dropout});
}

// torch.func's transforms come before autocast. They are lora_linear's, of the dequantized matrix,
// whose values are those that autocast would multiply.
Tensor lora_linear_quantized_functorch(const LoraLinearQuantizedCall& call) {
  const QuantizedFields fields = check_lora_linear_quantized(call);
  const auto dtype = is_autocast_on(call.x)
                         ? at::autocast::get_autocast_dtype(call.x.device().type())
                         : call.x.scalar_type();
  return lora_linear(call.with(dequantized(fields, dtype)));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_quantized", flat<&lora_linear_quantized_autograd>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_quantized", flat<&lora_linear_quantized_inference>);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_linear_quantized", flat<&lora_linear_quantized_functorch>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear_quantized", flat<&lora_linear_quantized_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear_quantized", flat<&lora_linear_quantized_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
