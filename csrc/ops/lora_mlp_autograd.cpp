// lora_mlp as a torch::autograd::Function, under torch.autocast, and under torch.func's transforms.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autocast.h"
#include "ops/lora_mlp.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool any_of_them(at::TensorList list, bool (*is)(const Tensor&)) {
  return std::any_of(list.begin(), list.end(), is);
}
bool needs_grad(const Tensor& tensor) { return tensor.requires_grad(); }
bool carries_tangent(const Tensor& tensor) { return has_tangent(tensor); }

// Whether a parameter of these layers does, of every list or of those that x is read for.
bool any_needs_grad(const LoraLinearMultiCall& layers, bool of_x) {
  if (any_of_them(layers.weight, needs_grad) || any_of_them(layers.lora_A, needs_grad)) return true;
  return !of_x && (any_of_them(layers.bias, needs_grad) || any_of_them(layers.lora_B, needs_grad) ||
                   any_of_them(layers.lora_bias, needs_grad));
}

Tensor made_by(const LayerOfMulti& layer) {
  return layer.adapted ? lora_linear(layer.call()) : at::linear(layer.x, layer.weight, layer.bias);
}

struct DifferentiablePair {
  Tensor e, g;
};
DifferentiablePair differentiable_pair(const TensorVector& made) {
  if (made.size() == 2) return {made[0], made[1]};
  const c10::SymInt I = made[0].sym_size(-1) / 2;
  return {made[0].narrow_symint(-1, 0, I), made[0].narrow_symint(-1, I, I)};
}

struct LoraMlp : torch::autograd::Function<LoraMlp> {
  static constexpr bool is_traceable = true;

  // y; and behind it, under cast_x, the cast x where it is kept, as in lora_linear_multi.
  static variable_list forward(AutogradContext* ctx, bool recompute, bool cast_x,
                               const Tensor& given, const auto&... lists) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor x = cast_to_weight(given, std::get<0>(std::tie(lists...)), cast_x);
    const LoraMlpCall call{x, lists...};
    const size_t layers = call.weight.size(), entries = layers - 1;
    // As in lora_linear_multi: under dropout a CPU makes h again of what its layer reads. Of the
    // last layer that is there in backward.
    const bool save_x = recompute || any_needs_grad(entries_of(call), /*of_x=*/true);
    std::vector<int64_t> save_h(layers);
    for (size_t i = 0; i < layers; ++i) {
      const bool reads = i == entries || save_x;
      const bool makes_h = recompute || (reads && call.dropout_p[i] > 0.0 && !call.x.is_cuda());
      save_h[i] = call.lora_B[i].requires_grad() && !makes_h;
    }
    auto [y, made, h] = lora_mlp_fwd(call, save_h);
    for (size_t i = 0; i < layers; ++i) {
      if (!save_h[i]) h[i] = Tensor();
    }
    if (recompute) made.clear();
    variable_list saved = {save_x ? x : Tensor()};
    std::vector<int64_t> counts;
    for (const at::TensorList& list :
         {at::TensorList(made), at::TensorList(h), call.weight, call.bias, call.lora_A, call.lora_B,
          call.lora_bias, call.scaling_tensor, call.rng_state}) {
      saved.insert(saved.end(), list.begin(), list.end());
      counts.push_back(static_cast<int64_t>(list.size()));
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["counts"] = counts;
    ctx->saved_data["scaling"] = call.scaling.vec();
    ctx->saved_data["dropout_p"] = call.dropout_p.vec();
    ctx->saved_data["activation"] = std::string(call.activation);
    ctx->set_materialize_grads(false);
    if (cast_x) ctx->saved_data["dx_type"] = given.scalar_type();
    return cast_x && save_x ? variable_list{y, x} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const auto scaling = ctx->saved_data["scaling"].toDoubleVector();
    const auto dropout_p = ctx->saved_data["dropout_p"].toDoubleVector();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    size_t place = 1, list = 0;
    const auto take = [&] {
      const auto size = static_cast<size_t>(counts[list++]);
      const at::TensorList taken = at::TensorList(saved).slice(place, size);
      place += size;
      return taken;
    };
    const at::TensorList made = take(), kept_h = take(), weight = take(), bias = take(),
                         lora_A = take(), lora_B = take(), lora_bias = take(),
                         scaling_tensor = take(), rng_state = take();

    // needs_input_grad counts the tensors that were passed; the gradients' places count all
    // arguments: recompute, cast_x, x, the five lists, and so many of scaling_tensor and rng_state
    // with scaling, dropout_p and activation.
    const size_t layers = weight.size();
    size_t input = 0;
    const bool wants_x = ctx->needs_input_grad(input++);
    std::vector<int64_t> wanted(layers, 0);
    variable_list grads(3);
    constexpr size_t kPlaceOfX = 2;
    std::vector<std::pair<Gradient, size_t>> lists;  // and where each begins in grads
    for (const auto& [gradient, size] : {std::pair{kGradWeight, weight.size()},
                                         {kGradBias, bias.size()},
                                         {kGradA, lora_A.size()},
                                         {kGradB, lora_B.size()},
                                         {kGradLoraBias, lora_bias.size()}}) {
      lists.emplace_back(gradient, grads.size());
      grads.resize(grads.size() + size);
      for (size_t i = 0; i < size; ++i) {
        if (ctx->needs_input_grad(input++)) wanted[i] |= int64_t{1} << gradient;
      }
    }
    grads.resize(grads.size() + scaling_tensor.size() + rng_state.size() + 3);

    OptionalType dx_type;
    if (const auto found = ctx->saved_data.find("dx_type"); found != ctx->saved_data.end()) {
      dx_type = found->second.toScalarType();
    }
    if (wants_x && grad_outputs.size() > 1 && grad_outputs[1].defined()) {
      grads[kPlaceOfX] = grad_outputs[1].to(*dx_type);  // of the cast x, from a second backward
    }
    const Tensor& dy = grad_outputs[0];
    if (!dy.defined()) return grads;
    TensorVector h;
    for (const Tensor& one : kept_h) {
      h.push_back(one.defined() ? one : at::empty({0}, dy.options()));
    }
    const OptionalTensor x = if_defined(saved[0]);
    const LoraMlpBackwardCall call{
        dy,        x,       made,           h,         weight,    bias,      lora_A, lora_B,
        lora_bias, scaling, scaling_tensor, dropout_p, rng_state, activation};
    const bool differentiable = needs_differentiable_backward(dy) || is_batched(dy);
    const MultiGradients all = differentiable
                                   ? lora_mlp_bwd_decomposed(call, wants_x, wanted, dx_type)
                                   : lora_mlp_bwd(call, wants_x, wanted, dx_type);
    if (wants_x) {
      Tensor& dx = grads[kPlaceOfX];
      dx = dx.defined() ? dx + std::get<kGradX>(all) : std::get<kGradX>(all);
    }
    const auto put = [&](Gradient gradient, const TensorVector& found) {
      for (const auto& [own, begin] : lists) {
        if (own != gradient) continue;
        for (size_t i = 0; i < layers; ++i) {
          if ((wanted[i] >> gradient) & 1) grads[begin + i] = found[i];
        }
      }
    };
    put(kGradWeight, std::get<kGradWeight>(all)), put(kGradBias, std::get<kGradBias>(all));
    put(kGradA, std::get<kGradA>(all)), put(kGradB, std::get<kGradB>(all));
    put(kGradLoraBias, std::get<kGradLoraBias>(all));
    return grads;
  }
};

Tensor lora_mlp_inference(const LoraMlpCall& call, bool, bool cast_x) {
  const std::vector<int64_t> no_h(call.weight.size(), 0);
  const Tensor x = cast_to_weight(call.x, call.weight, cast_x);
  return std::get<0>(lora_mlp_fwd(call.with(x), no_h));
}

Tensor lora_mlp_autograd(const LoraMlpCall& call, bool recompute, bool cast_x) {
  check_lora_mlp(call, cast_x);
  bool has_tangents = has_tangent(call.x) || any_of_them(call.scaling_tensor, carries_tangent);
  for (const at::TensorList& list :
       {call.weight, call.bias, call.lora_A, call.lora_B, call.lora_bias}) {
    has_tangents = has_tangents || any_of_them(list, carries_tangent);
  }
  if (has_tangents) return lora_mlp_decomposed(call, cast_x);
  const LoraLinearMultiCall entries = entries_of(call), down = down_of(call, call.x);
  const bool grad = at::GradMode::is_enabled();
  if (grad && (call.x.requires_grad() || any_needs_grad(entries, /*of_x=*/false))) {
    return std::apply(
        [&](const auto&... fields) { return LoraMlp::apply(recompute, cast_x, fields...)[0]; },
        call.fields());
  }
  // Its layer keeps what it reads, and nothing else is kept.
  if (grad && any_needs_grad(down, /*of_x=*/false)) return lora_mlp_decomposed(call, cast_x);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lora_mlp_inference(call, recompute, cast_x);
}

template <c10::DeviceType kDevice>
Tensor lora_mlp_autocast(const LoraMlpCall& call, bool recompute, bool) {
  const AutocastScope<kDevice> cast;
  const auto [weight, bias, lora_A, lora_B, lora_bias, cast_x] = cast.lists(call);
  return lora_mlp(
      {cast_x ? call.x : cast.base(call.x), weight, bias, lora_A, lora_B, lora_bias, call.scaling,
       call.scaling_tensor, call.dropout_p, call.rng_state, call.activation},
      recompute, cast_x);
}

Tensor lora_mlp_functorch(const LoraMlpCall& call, bool, bool cast_x) {
  return lora_mlp_decomposed(call, cast_x);
}

}  // namespace

Tensor lora_mlp_decomposed(const LoraMlpCall& call, bool cast_x) {
  const Activation f = activation_of("lora_mlp", call.activation);
  const TensorVector made = lora_linear_multi_separate(entries_of(call), cast_x);
  const auto [e, g] = differentiable_pair(made);
  const Tensor a = activation(e, f) * g;
  return made_by(layers_of(down_of(call, a))[0]);
}

MultiGradients lora_mlp_bwd_decomposed(const LoraMlpBackwardCall& call, bool wants_x,
                                       at::IntArrayRef wanted, OptionalType dx_type) {
  TORCH_CHECK(call.x.has_value(),
              "lora_mlp: double backward: x was not kept, since lora_A and weight of the layers "
              "that read it are frozen; let lora_A require grad to differentiate twice");
  const Activation f = activation_of("lora_mlp_bwd", call.activation);
  const LoraMlpCall forward{*call.x,        call.weight,    call.bias,      call.lora_A,
                            call.lora_B,    call.lora_bias, call.scaling,   call.scaling_tensor,
                            call.dropout_p, call.rng_state, call.activation};
  const std::vector<LayerOfMulti> entries = layers_of(entries_of(forward));
  TensorVector made;
  for (const LayerOfMulti& layer : entries) made.push_back(made_by(layer));
  const auto [e, g] = differentiable_pair(made);
  const Tensor fe = activation(e, f);
  const Tensor a = fe * g;

  MultiGradients all = no_gradients(call.weight.size());
  const auto backward_of = [&](const LayerOfMulti& layer, const Tensor& dy, size_t i, bool of_x) {
    GradientMask mask{of_x};
    for (int gradient = kGradX + 1; gradient < kGradients; ++gradient) {
      mask[gradient] = (wanted[i] >> gradient) & 1;
    }
    const OptionalTensor x = layer.x;
    const OptionalTensor weight = layer.weight;
    const TensorVector own = lora_linear_bwd_decomposed(
        {dy, x, kNoTensor, weight, layer.lora_A, layer.lora_B, layer.scaling, layer.dropout}, mask);
    put_gradients(all, i, {Tensor(), own[1], own[2], own[3], own[4], own[5]});
    return own[kGradX];
  };
  const bool below =
      wants_x || std::any_of(wanted.begin(), wanted.end() - 1, [](int64_t m) { return m != 0; });
  const std::vector<LayerOfMulti> down = layers_of(down_of(forward, a));
  const Tensor da = backward_of(down[0], call.dy, entries.size(), below);
  if (!below) return all;
  const Tensor de = activation_backward(da * g, e, f), dg = da * fe;
  const TensorVector d_made =
      entries.size() == 2 ? TensorVector{de, dg} : TensorVector{at::cat({de, dg}, -1)};
  Tensor& dx = std::get<kGradX>(all);
  for (size_t i = 0; i < entries.size(); ++i) {
    const Tensor own = backward_of(entries[i], d_made[i], i, wants_x);
    if (!wants_x) continue;
    const Tensor term = own.to(dx_type.value_or(own.scalar_type()));
    dx = dx.defined() ? dx + term : term;
  }
  return all;
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("lora_mlp", flat<&lora_mlp_autograd>); }

// Under inference mode tensors carry no Autograd key.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_mlp", flat<&lora_mlp_inference>);
}

// lora_linear knows transforms, and autocast after them.
TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_mlp", flat<&lora_mlp_functorch>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_mlp", flat<&lora_mlp_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_mlp", flat<&lora_mlp_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
