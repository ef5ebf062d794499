// lora_linear_multi as a torch::autograd::Function, under torch.autocast, and under torch.func's
// transforms.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autocast.h"
#include "ops/lora_linear_multi.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool any_of_them(std::initializer_list<at::TensorList> lists, bool (*is)(const Tensor&)) {
  return std::any_of(lists.begin(), lists.end(), [&](const at::TensorList& list) {
    return std::any_of(list.begin(), list.end(), is);
  });
}
bool needs_grad(const Tensor& tensor) { return tensor.requires_grad(); }
bool carries_tangent(const Tensor& tensor) { return has_tangent(tensor); }

// The gradients out of differentiable operators.
MultiGradients lora_linear_multi_bwd_decomposed(const LoraLinearMultiBackwardCall& call,
                                                bool wants_x, at::IntArrayRef wanted,
                                                OptionalType dx_type) {
  const auto layers = layers_of(call, wants_x, wanted);
  MultiGradients all = no_gradients(layers.size());
  Tensor& dx = std::get<kGradX>(all);
  size_t i = 0;
  for (const BackwardLayerOfMulti& layer : layers) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && layer.mask[kGradB] && layer.weight.has_value() &&
                  !call.x.has_value()),
                "lora_linear_multi: double backward: x was not kept, since lora_A and weight are "
                "frozen; let lora_A require grad to differentiate twice");
    const TensorVector own = lora_linear_bwd_decomposed(layer.call(), layer.mask);
    put_gradients(all, i++, {Tensor(), own[1], own[2], own[3], own[4], own[5]});
    if (!wants_x) continue;
    const Tensor term = own[kGradX].to(dx_type.value_or(own[kGradX].scalar_type()));
    dx = dx.defined() ? dx + term : term;
  }
  return all;
}

// Lists of backward's tensors: of each layer that has a gradient of y.
struct SavedLists {
  TensorVector dy, h, weight, lora_A, lora_B, scaling_tensor, rng_state;
  std::vector<double> scaling, dropout_p;
  std::vector<int64_t> wanted;
};

struct LoraLinearMulti : torch::autograd::Function<LoraLinearMulti> {
  static constexpr bool is_traceable = true;

  // y of each layer; and behind them, under cast_x, the cast x where it is kept, so that a second
  // backward finds x through it.
  static variable_list forward(AutogradContext* ctx, bool cast_x, const Tensor& given,
                               const auto&... lists) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor x = cast_to_weight(given, std::get<0>(std::tie(lists...)), cast_x);
    const LoraLinearMultiCall call{x, lists...};
    const size_t layers = call.weight.size();
    // As in lora_linear: under dropout a CPU makes h again from x, unless x is not kept.
    const bool save_x = any_of_them({call.weight, call.lora_A}, needs_grad);
    std::vector<int64_t> save_h(layers);
    for (size_t i = 0; i < layers; ++i) {
      const bool makes_h = save_x && call.dropout_p[i] > 0.0 && !call.x.is_cuda();
      save_h[i] = call.lora_B[i].requires_grad() && !makes_h;
    }
    auto [y, h] = lora_linear_multi_fwd(call, save_h);
    for (size_t i = 0; i < layers; ++i) {
      if (!save_h[i]) h[i] = Tensor();
    }
    variable_list saved = {save_x ? x : Tensor()};
    const at::TensorList weight = given.requires_grad() ? call.weight : at::TensorList();
    for (const at::TensorList& list : {at::TensorList(h), call.lora_A, call.lora_B, weight,
                                       call.scaling_tensor, call.rng_state}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(saved);
    // A layer whose y has no gradient is left out, and its parameters get none.
    ctx->set_materialize_grads(false);
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    ctx->saved_data["counts"] =
        std::vector<int64_t>{count(weight), count(call.scaling_tensor), count(call.rng_state),
                             count(call.bias), count(call.lora_bias)};
    ctx->saved_data["scaling"] = call.scaling.vec();
    ctx->saved_data["dropout_p"] = call.dropout_p.vec();
    if (cast_x) ctx->saved_data["dx_type"] = given.scalar_type();
    if (cast_x && save_x) y.push_back(x);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const auto scaling = ctx->saved_data["scaling"].toDoubleVector();
    const auto dropout_p = ctx->saved_data["dropout_p"].toDoubleVector();
    const size_t layers = scaling.size(), biases = counts[3], lora_biases = counts[4];
    size_t place = 1;
    const auto take = [&](size_t size) {
      const at::TensorList list = at::TensorList(saved).slice(place, size);
      place += size;
      return list;
    };
    const at::TensorList h = take(layers), lora_A = take(layers), lora_B = take(layers),
                         weight = take(counts[0]), scaling_tensor = take(counts[1]),
                         rng_state = take(counts[2]);

    // needs_input_grad counts the tensors that were passed.
    size_t input = 0;
    std::vector<int64_t> wanted(layers, 0);
    const auto next = [&] { return ctx->needs_input_grad(input++); };
    const auto want = [&](size_t size, Gradient gradient) {
      for (size_t i = 0; i < size; ++i) {
        if (next()) wanted[i] |= int64_t{1} << gradient;
      }
    };
    const bool wants_x = next();
    want(layers, kGradWeight), want(biases, kGradBias), want(layers, kGradA);
    want(layers, kGradB), want(lora_biases, kGradLoraBias);

    SavedLists own;
    std::vector<size_t> places;  // of the layers that have a gradient
    for (size_t i = 0; i < layers; ++i) {
      const Tensor& dy = grad_outputs[i];
      if (!dy.defined()) continue;
      places.push_back(i);
      own.dy.push_back(dy);
      own.h.push_back(h[i].defined() ? h[i] : at::empty({0}, dy.options()));
      own.lora_A.push_back(lora_A[i]), own.lora_B.push_back(lora_B[i]);
      if (!weight.empty()) own.weight.push_back(weight[i]);
      if (!scaling_tensor.empty()) own.scaling_tensor.push_back(scaling_tensor[i]);
      if (!rng_state.empty()) own.rng_state.push_back(rng_state[i]);
      own.scaling.push_back(scaling[i]), own.dropout_p.push_back(dropout_p[i]);
      own.wanted.push_back(wanted[i]);
    }

    // cast_x, x, the five lists, scaling, scaling_tensor, dropout_p, rng_state
    const size_t starts[] = {
        1, 2, 2 + layers, 2 + layers + biases, 2 + 2 * layers + biases, 2 + 3 * layers + biases};
    variable_list grads(starts[kGradLoraBias] + lora_biases + 2 + counts[1] + counts[2]);
    OptionalType dx_type;
    if (const auto found = ctx->saved_data.find("dx_type"); found != ctx->saved_data.end()) {
      dx_type = found->second.toScalarType();
    }
    Tensor& dx = grads[starts[kGradX]];
    if (wants_x && grad_outputs.size() > layers && grad_outputs[layers].defined()) {
      dx = grad_outputs[layers].to(*dx_type);  // of the cast x, from a second backward
    }
    if (places.empty()) return grads;
    const OptionalTensor x = if_defined(saved[0]);
    const LoraLinearMultiBackwardCall call{own.dy,        x,
                                           own.h,         own.weight,
                                           own.lora_A,    own.lora_B,
                                           own.scaling,   own.scaling_tensor,
                                           own.dropout_p, own.rng_state};
    const bool differentiable = std::any_of(own.dy.begin(), own.dy.end(), [](const Tensor& dy) {
      return needs_differentiable_backward(dy) || is_batched(dy);
    });
    const MultiGradients all =
        differentiable ? lora_linear_multi_bwd_decomposed(call, wants_x, own.wanted, dx_type)
                       : lora_linear_multi_bwd(call, wants_x, own.wanted, dx_type);
    if (wants_x) dx = dx.defined() ? dx + std::get<kGradX>(all) : std::get<kGradX>(all);
    const auto put = [&](Gradient gradient, const TensorVector& found) {
      for (size_t i = 0; i < places.size(); ++i) {
        if ((own.wanted[i] >> gradient) & 1) grads[starts[gradient] + places[i]] = found[i];
      }
    };
    put(kGradWeight, std::get<kGradWeight>(all)), put(kGradBias, std::get<kGradBias>(all));
    put(kGradA, std::get<kGradA>(all)), put(kGradB, std::get<kGradB>(all));
    put(kGradLoraBias, std::get<kGradLoraBias>(all));
    return grads;
  }
};

TensorVector lora_linear_multi_inference(const LoraLinearMultiCall& call, bool cast_x) {
  const std::vector<int64_t> no_h(call.weight.size(), 0);
  const Tensor x = cast_to_weight(call.x, call.weight, cast_x);
  return std::get<0>(lora_linear_multi_fwd(call.with(x), no_h));
}

TensorVector lora_linear_multi_autograd(const LoraLinearMultiCall& call, bool cast_x) {
  const auto operands = {call.weight, call.bias, call.lora_A, call.lora_B, call.lora_bias};
  if (has_tangent(call.x) || any_of_them(operands, carries_tangent) ||
      any_of_them({call.scaling_tensor}, carries_tangent)) {
    return lora_linear_multi_separate(call, cast_x);
  }
  if (at::GradMode::is_enabled() && (call.x.requires_grad() || any_of_them(operands, needs_grad))) {
    check_lora_linear_multi_lists(call);
    variable_list y =
        std::apply([&](const auto&... fields) { return LoraLinearMulti::apply(cast_x, fields...); },
                   call.fields());
    y.resize(call.weight.size());
    return y;
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lora_linear_multi_inference(call, cast_x);
}

template <c10::DeviceType kDevice>
TensorVector lora_linear_multi_autocast(const LoraLinearMultiCall& call, bool) {
  const AutocastScope<kDevice> cast;
  const auto [weight, bias, lora_A, lora_B, lora_bias, cast_x] = cast.lists(call);
  return lora_linear_multi(
      {cast_x ? call.x : cast.base(call.x), weight, bias, lora_A, lora_B, lora_bias, call.scaling,
       call.scaling_tensor, call.dropout_p, call.rng_state},
      cast_x);
}

}  // namespace

TensorVector lora_linear_multi_separate(const LoraLinearMultiCall& call, bool cast_x) {
  TensorVector y;
  for (const LayerOfMulti& layer : layers_of(call)) {
    const Tensor x = cast_to_weight(layer.x, layer.weight, cast_x);
    y.push_back(layer.adapted
                    ? lora_linear({x, layer.weight, layer.bias, layer.lora_A, layer.lora_B,
                                   layer.lora_bias, layer.scaling, layer.dropout})
                    : at::linear(x, layer.weight, layer.bias));
  }
  return y;
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_multi", flat<&lora_linear_multi_autograd>);
}

// Under inference mode tensors carry no Autograd key.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_multi", flat<&lora_linear_multi_inference>);
}

// lora_linear knows transforms, and autocast after them.
TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_linear_multi", flat<&lora_linear_multi_separate>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear_multi", flat<&lora_linear_multi_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear_multi", flat<&lora_linear_multi_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
