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

// As calls of their own: where each is transformed, or is the more exact way.
TensorVector lora_linear_multi_separate(const LoraLinearMultiCall& call) {
  TensorVector y;
  for (const LayerOfMulti& layer : layers_of(call)) {
    y.push_back(layer.adapted ? lora_linear(layer.call())
                              : at::linear(layer.x, layer.weight, layer.bias));
  }
  return y;
}

// The gradients out of differentiable operators.
MultiGradients lora_linear_multi_bwd_decomposed(const LoraLinearMultiBackwardCall& call,
                                                bool wants_x, at::IntArrayRef wanted) {
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
    if (wants_x) dx = dx.defined() ? dx + own[kGradX] : own[kGradX];
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

  template <class... Fields>
  static variable_list forward(AutogradContext* ctx, const Fields&... fields) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LoraLinearMultiCall call{fields...};
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
    variable_list saved = {save_x ? call.x : Tensor()};
    const at::TensorList weight = call.x.requires_grad() ? call.weight : at::TensorList();
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

    // x, the five lists, scaling, scaling_tensor, dropout_p, rng_state
    const size_t starts[] = {
        0, 1, 1 + layers, 1 + layers + biases, 1 + 2 * layers + biases, 1 + 3 * layers + biases};
    variable_list grads(starts[kGradLoraBias] + lora_biases + 2 + counts[1] + counts[2]);
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
    const MultiGradients all = differentiable
                                   ? lora_linear_multi_bwd_decomposed(call, wants_x, own.wanted)
                                   : lora_linear_multi_bwd(call, wants_x, own.wanted);
    if (wants_x) grads[0] = std::get<kGradX>(all);
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

TensorVector lora_linear_multi_inference(const LoraLinearMultiCall& call) {
  const std::vector<int64_t> no_h(call.weight.size(), 0);
  return std::get<0>(lora_linear_multi_fwd(call, no_h));
}

TensorVector lora_linear_multi_autograd(const LoraLinearMultiCall& call) {
  const auto operands = {call.weight, call.bias, call.lora_A, call.lora_B, call.lora_bias};
  if (has_tangent(call.x) || any_of_them(operands, carries_tangent) ||
      any_of_them({call.scaling_tensor}, carries_tangent)) {
    return lora_linear_multi_separate(call);
  }
  if (at::GradMode::is_enabled() && (call.x.requires_grad() || any_of_them(operands, needs_grad))) {
    check_lora_linear_multi_lists(call);
    return std::apply([](const auto&... fields) { return LoraLinearMulti::apply(fields...); },
                      call.fields());
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lora_linear_multi_inference(call);
}

template <c10::DeviceType kDevice>
TensorVector lora_linear_multi_autocast(const LoraLinearMultiCall& call) {
  // Calls of their own cast x for each, so that autograd adds up the parts of its gradient in
  // float; here they would be added up in 16 bits.
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  if (at::GradMode::is_enabled() && call.x.requires_grad() && call.x.scalar_type() != dtype) {
    return lora_linear_multi_separate(call);
  }
  const AutocastScope<kDevice> cast;
  const TensorVector weight = cast.bases(call.weight), bias = cast.bases(call.bias),
                     lora_A = cast.adapters(call.lora_A), lora_B = cast.adapters(call.lora_B),
                     lora_bias = cast.adapters(call.lora_bias);
  return lora_linear_multi({cast.base(call.x), weight, bias, lora_A, lora_B, lora_bias,
                            call.scaling, call.scaling_tensor, call.dropout_p, call.rng_state});
}

}  // namespace

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
