// Schemas, dispatcher handles, checks, Meta kernels of lora_mlp, and what it is made of.
#include "ops/lora_mlp.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

constexpr const char* kMlp = "lora_mlp";
constexpr const char* kMlpBwd = "lora_mlp_bwd";

// [M, I] each.
struct GatedPair {
  Tensor e, g;
};

// The halves of one tensor, or two.
GatedPair gated_pair(at::TensorList made) {
  if (made.size() == 2) return {as_rows(made[0]), as_rows(made[1])};
  const Tensor rows = as_rows(made[0]);
  const int64_t I = rows.size(1) / 2;
  return {rows.narrow(1, 0, I), rows.narrow(1, I, I)};
}

// Of a list with an entry for each layer, or none.
at::TensorList part(at::TensorList list, size_t first, size_t count) {
  return list.empty() ? list : list.slice(first, count);
}

LoraLinearMultiCall part(const LoraMlpCall& call, const Tensor& x, size_t first, size_t count) {
  return {x,
          call.weight.slice(first, count),
          part(call.bias, first, count),
          part(call.lora_A, first, count),
          part(call.lora_B, first, count),
          part(call.lora_bias, first, count),
          call.scaling.slice(first, count),
          part(call.scaling_tensor, first, count),
          call.dropout_p.slice(first, count),
          part(call.rng_state, first, count)};
}

// Backward of some of the layers, whose input is x.
LoraLinearMultiBackwardCall part(const LoraMlpBackwardCall& call, at::TensorList dy,
                                 const OptionalTensor& x, size_t first, size_t count) {
  return {dy,
          x,
          part(call.h, first, count),
          call.weight.slice(first, count),
          part(call.lora_A, first, count),
          part(call.lora_B, first, count),
          call.scaling.slice(first, count),
          part(call.scaling_tensor, first, count),
          call.dropout_p.slice(first, count),
          part(call.rng_state, first, count)};
}

LoraMlpCall forward_of(const LoraMlpBackwardCall& call, const Tensor& x) {
  return {x,
          call.weight,
          call.bias,
          call.lora_A,
          call.lora_B,
          call.lora_bias,
          call.scaling,
          call.scaling_tensor,
          call.dropout_p,
          call.rng_state,
          call.activation};
}

void append(MultiGradients& all, const MultiGradients& own) {
  const auto add = [](TensorVector& list, const TensorVector& more) {
    list.insert(list.end(), more.begin(), more.end());
  };
  add(std::get<kGradWeight>(all), std::get<kGradWeight>(own));
  add(std::get<kGradBias>(all), std::get<kGradBias>(own));
  add(std::get<kGradA>(all), std::get<kGradA>(own));
  add(std::get<kGradB>(all), std::get<kGradB>(own));
  add(std::get<kGradLoraBias>(all), std::get<kGradLoraBias>(own));
}

// Of layers of which nothing is wanted, as lora_linear_multi_bwd returns them.
MultiGradients empty_gradients(const LoraMlpBackwardCall& call, size_t layers) {
  MultiGradients all = no_gradients(layers);
  std::get<kGradX>(all) = gradient_or_empty(false, call.dy);
  for (size_t i = 0; i < layers; ++i) {
    const Tensor base = gradient_or_empty(false, call.dy),
                 adapter = gradient_or_empty(false, call.lora_A[i]);
    put_gradients(all, i,
                  {Tensor(), base, base.clone(), adapter, adapter.clone(), adapter.clone()});
  }
  return all;
}

bool any(at::IntArrayRef wanted) {
  return std::any_of(wanted.begin(), wanted.end(), [](int64_t mask) { return mask != 0; });
}

Tensor gated(at::TensorList made, Activation f, const GatedOps& ops) {
  const GatedPair pair = gated_pair(made);
  std::vector<int64_t> sizes = made[0].sizes().vec();
  sizes.back() = pair.e.size(1);
  const Tensor a = at::empty(sizes, made[0].options());
  ops.forward(a.view(pair.e.sizes()), pair.e, pair.g, f);
  return a;
}

// The gradients of what the layers of x made. da and a are no more than room afterwards.
TensorVector gated_backward(const Tensor& da, const Tensor& a, at::TensorList made, Activation f,
                            const GatedOps& ops) {
  const GatedPair pair = gated_pair(made);
  const Tensor da_rows = as_rows(da);
  if (made.size() == 2) {
    ops.backward(da_rows, as_rows(a), da_rows, pair.e, pair.g, f);
    return {da_rows.view(da.sizes()), a};
  }
  TensorVector result{at::empty(made[0].sizes(), made[0].options())};
  const GatedPair gradients = gated_pair(result);
  ops.backward(gradients.e, gradients.g, da_rows, pair.e, pair.g, f);
  return result;
}

std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd_composed(const LoraMlpCall& call,
                                                                     at::IntArrayRef return_h) {
  return lora_mlp_fwd_by(call, return_h, kGatedComposed);
}

MultiGradients lora_mlp_bwd_composed(const LoraMlpBackwardCall& call, bool wants_x,
                                     at::IntArrayRef wanted, OptionalType dx_type) {
  return lora_mlp_bwd_by(call, wants_x, wanted, dx_type, kGatedComposed);
}

std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd_meta(const LoraMlpCall& call,
                                                                 at::IntArrayRef return_h) {
  check_lora_mlp(call);
  activation_of(kMlp, call.activation);
  const size_t entries = call.weight.size() - 1;
  auto [made, h] = lora_linear_multi_fwd(entries_of(call), return_h.slice(0, entries));
  const Tensor a = call.x.new_empty_symint(with_width(call.x, call.weight[entries].sym_size(1)));
  auto [y, own_h] = lora_linear_multi_fwd(down_of(call, a), return_h.slice(entries));
  h.push_back(own_h[0]);
  return {y[0], made, h};
}

MultiGradients lora_mlp_bwd_meta(const LoraMlpBackwardCall& call, bool wants_x,
                                 at::IntArrayRef wanted, OptionalType dx_type) {
  activation_of(kMlpBwd, call.activation);
  const size_t entries = call.weight.size() - 1;
  const bool wants_below = wants_x || any(wanted.slice(0, entries));
  const Tensor a = call.dy.new_empty_symint(with_width(call.dy, call.weight[entries].sym_size(1)));
  const MultiGradients down = lora_linear_multi_bwd(part(call, call.dy, a, entries, 1), wants_below,
                                                    wanted.slice(entries), std::nullopt);
  TensorVector d_made;
  for (size_t i = 0; i < entries; ++i) {
    d_made.push_back(call.dy.new_empty_symint(with_width(call.dy, call.weight[i].sym_size(0))));
  }
  MultiGradients all = empty_gradients(call, entries);
  if (wants_below) {
    all = lora_linear_multi_bwd(part(call, d_made, call.x, 0, entries), wants_x,
                                wanted.slice(0, entries), dx_type);
  }
  append(all, down);
  return all;
}

}  // namespace

LoraLinearMultiCall entries_of(const LoraMlpCall& call) {
  return part(call, call.x, 0, call.weight.size() - 1);
}

LoraLinearMultiCall down_of(const LoraMlpCall& call, const Tensor& a) {
  return part(call, a, call.weight.size() - 1, 1);
}

std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd_by(const LoraMlpCall& call,
                                                               at::IntArrayRef return_h,
                                                               const GatedOps& ops) {
  check_lora_mlp(call);
  const Activation f = activation_of(kMlp, call.activation);
  const size_t entries = call.weight.size() - 1;
  auto [made, h] = lora_linear_multi_fwd(entries_of(call), return_h.slice(0, entries));
  auto [y, own_h] =
      lora_linear_multi_fwd(down_of(call, gated(made, f, ops)), return_h.slice(entries));
  h.push_back(own_h[0]);
  return {y[0], made, h};
}

MultiGradients lora_mlp_bwd_by(const LoraMlpBackwardCall& call, bool wants_x,
                               at::IntArrayRef wanted, OptionalType dx_type, const GatedOps& ops) {
  const Activation f = activation_of(kMlpBwd, call.activation);
  const size_t entries = call.weight.size() - 1;
  TensorVector made = call.made.vec();
  if (made.empty()) {
    TORCH_CHECK_VALUE(call.x.has_value(), kMlpBwd,
                      ": x: got None, expected [..., in_features], or what its layers made");
    const std::vector<int64_t> no_h(entries, 0);
    made = std::get<0>(lora_linear_multi_fwd(entries_of(forward_of(call, *call.x)), no_h));
  }
  const bool wants_below = wants_x || any(wanted.slice(0, entries));
  MultiGradients all = empty_gradients(call, entries), down;
  TensorVector d_made;
  {
    const Tensor a = gated(made, f, ops);
    down = lora_linear_multi_bwd(part(call, call.dy, a, entries, 1), wants_below,
                                 wanted.slice(entries), std::nullopt);
    if (wants_below) d_made = gated_backward(std::get<kGradX>(down), a, made, f, ops);
  }
  made.clear();
  if (wants_below) {
    all = lora_linear_multi_bwd(part(call, d_made, call.x, 0, entries), wants_x,
                                wanted.slice(0, entries), dx_type);
  }
  append(all, down);
  return all;
}

void check_lora_mlp(const LoraMlpCall& call, bool cast_x) {
  const size_t layers = call.weight.size();
  TORCH_CHECK_VALUE(layers == 2 || layers == 3, kMlp, ": weight: got ", layers,
                    " entries, expected 3, of gate, up and down, or 2, of one layer that is both, "
                    "and down");
  const auto check_entries = [&](const char* name, size_t got, bool may_be_empty) {
    TORCH_CHECK_VALUE(got == layers || (may_be_empty && got == 0), kMlp, ": ", name, ": got ", got,
                      " entries, expected ", layers, ", one for each layer");
  };
  check_entries("bias", call.bias.size(), true);
  check_entries("lora_A", call.lora_A.size(), false);
  check_entries("lora_B", call.lora_B.size(), false);
  check_entries("lora_bias", call.lora_bias.size(), true);
  check_entries("scaling", call.scaling.size(), false);
  check_entries("scaling_tensor", call.scaling_tensor.size(), true);
  check_entries("dropout_p", call.dropout_p.size(), false);
  check_entries("rng_state", call.rng_state.size(), true);
  static constexpr const char* kNames[][3] = {{"lora_mlp: gate_up", "lora_mlp: down"},
                                              {"lora_mlp: gate", "lora_mlp: up", "lora_mlp: down"}};
  const auto& names = kNames[layers - 2];
  for (size_t i = 0; i < layers; ++i) {
    check_adapter_is_whole(names[i], call.lora_A[i], call.lora_B[i]);
  }
  const auto rows_of = [](const Tensor& weight) {
    return weight.dim() == 2 ? weight.sym_size(0) : c10::SymInt(-1);
  };
  const Tensor& down = call.weight[layers - 1];
  const c10::SymInt width = down.dim() == 2 ? down.sym_size(1) : c10::SymInt(-1);
  TORCH_CHECK_VALUE(width >= 0, kMlp, ": down: weight: got shape ", down.sym_sizes(),
                    ", expected [out_features, in_features]");
  const c10::SymInt expected = layers == 3 ? width : width * 2;
  for (size_t i = 0; i + 1 < layers; ++i) {
    TORCH_CHECK_VALUE(rows_of(call.weight[i]) == expected, names[i], ": weight: got shape ",
                      call.weight[i].sym_sizes(), ", expected [", expected,
                      ", in_features]: down has ", width, " in_features");
  }
  check_dense(kMlp, "x", call.x);
  TORCH_CHECK_VALUE(call.x.dim() >= 1, kMlp, ": x: got a 0-d tensor, expected [..., in_features]");
  const auto check_layer = [](const LayerOfMulti& layer, const char* name) {
    TORCH_CHECK_VALUE(layer.adapted || !layer.lora_bias.has_value(), name,
                      ": lora_bias: got one without lora_A and lora_B, expected none");
    check_lora_linear(layer.call(), name);
  };
  const Tensor x =
      cast_x ? call.x.new_empty_symint({0, call.x.sym_size(-1)}, down.options()) : call.x;
  const std::vector<LayerOfMulti> entries = layers_of(entries_of(call.with(x)));
  for (size_t i = 0; i < entries.size(); ++i) check_layer(entries[i], names[i]);
  const Tensor no_rows = x.new_empty_symint({0, width});
  check_layer(layers_of(down_of(call, no_rows))[0], names[layers - 1]);
}

Tensor lora_mlp(const LoraMlpCall& call, bool recompute, bool cast_x) {
  static const Operator<&lora_mlp> op("lora_ext::lora_mlp");
  return op(call, recompute, cast_x);
}

std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd(const LoraMlpCall& call,
                                                            at::IntArrayRef return_h) {
  static const Operator<&lora_mlp_fwd> op("lora_ext::lora_mlp_fwd");
  return op(call, return_h);
}

MultiGradients lora_mlp_bwd(const LoraMlpBackwardCall& call, bool wants_x, at::IntArrayRef wanted,
                            OptionalType dx_type) {
  static const Operator<&lora_mlp_bwd> op("lora_ext::lora_mlp_bwd");
  return op(call, wants_x, wanted, dx_type);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_mlp(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_A, Tensor[] lora_B, "
      "Tensor[] lora_bias, float[] scaling, Tensor[] scaling_tensor, float[] dropout_p, "
      "Tensor[] rng_state, str activation, bool recompute=False, bool cast_x=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_mlp_fwd(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_A, Tensor[] lora_B, "
      "Tensor[] lora_bias, float[] scaling, Tensor[] scaling_tensor, float[] dropout_p, "
      "Tensor[] rng_state, str activation, int[] return_h) -> "
      "(Tensor y, Tensor[] made, Tensor[] h)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_mlp_bwd(Tensor dy, Tensor? x, Tensor[] made, Tensor[] h, Tensor[] weight, "
      "Tensor[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor[] lora_bias, float[] scaling, "
      "Tensor[] scaling_tensor, float[] dropout_p, Tensor[] rng_state, str activation, "
      "bool wants_x, int[] wanted, ScalarType? dx_type=None) -> (Tensor dx, Tensor[] dweight, "
      "Tensor[] dbias, Tensor[] dlora_A, Tensor[] dlora_B, Tensor[] dlora_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_mlp_fwd", flat<&lora_mlp_fwd_meta>);
  m.impl("lora_mlp_bwd", flat<&lora_mlp_bwd_meta>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_mlp_fwd", flat<&lora_mlp_fwd_composed>);
  m.impl("lora_mlp_bwd", flat<&lora_mlp_bwd_composed>);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_mlp_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_mlp_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
