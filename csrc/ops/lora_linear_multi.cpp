// Schemas, dispatcher handles, checks, Meta kernels and the composed form of lora_linear_multi.
#include "ops/lora_linear_multi.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>

#include "ops/checks.h"
#include "ops/lora_linear_prepare.h"
#include "ops/operator.h"
#include "ops/product.h"

namespace lora_ext {
namespace {

constexpr const char* kMulti = "lora_linear_multi";
constexpr const char* kMultiBwd = "lora_linear_multi_bwd";

bool is_none(const Tensor& tensor) { return tensor.dim() == 1 && tensor.sym_size(0) == 0; }

// An entry that may be none.
OptionalTensor entry(at::TensorList list, size_t layer) {
  return list.empty() || is_none(list[layer]) ? std::nullopt : OptionalTensor(list[layer]);
}

// in_features, of whichever operand tells it.
c10::SymInt columns_of(const LoraLinearMultiBackwardCall& call) {
  if (call.x.has_value() && call.x->dim() > 0) return call.x->sym_size(-1);
  for (const at::TensorList& list : {call.lora_A, call.weight}) {
    for (const Tensor& matrix : list) {
      if (matrix.dim() == 2) return matrix.sym_size(1);
    }
  }
  return 0;
}

// For messages: operator and layer.
std::string name_of(const char* op, size_t layer) {
  return std::string(op) + ": layer " + std::to_string(layer);
}

void check_entries(const char* op, const char* name, size_t got, size_t layers,
                   bool may_be_empty = false) {
  TORCH_CHECK_VALUE(got == layers || (may_be_empty && got == 0), op, ": ", name, ": got ", got,
                    " entries, expected ", layers, ", one for each layer",
                    may_be_empty ? ", or none" : "");
}

// For the layers that drop elements; those without adapter do not.
LoraDropout dropout_of(bool adapted, at::ArrayRef<double> dropout_p, at::TensorList rng_state,
                       size_t layer) {
  if (!adapted) return {0.0, std::nullopt};
  return {dropout_p[layer], entry(rng_state, layer)};
}

void check_backward_lists(const LoraLinearMultiBackwardCall& call, at::IntArrayRef wanted) {
  const size_t layers = call.dy.size();
  TORCH_CHECK_VALUE(layers > 0, kMultiBwd, ": dy: got no layers, expected at least one");
  check_entries(kMultiBwd, "h", call.h.size(), layers, true);
  check_entries(kMultiBwd, "weight", call.weight.size(), layers, true);
  check_entries(kMultiBwd, "lora_A", call.lora_A.size(), layers);
  check_entries(kMultiBwd, "lora_B", call.lora_B.size(), layers);
  check_entries(kMultiBwd, "scaling", call.scaling.size(), layers);
  check_entries(kMultiBwd, "scaling_tensor", call.scaling_tensor.size(), layers, true);
  check_entries(kMultiBwd, "dropout_p", call.dropout_p.size(), layers);
  check_entries(kMultiBwd, "rng_state", call.rng_state.size(), layers, true);
  check_entries(kMultiBwd, "wanted", wanted.size(), layers);
  for (size_t i = 0; i < layers; ++i) {
    check_adapter_is_whole(name_of(kMultiBwd, i), call.lora_A[i], call.lora_B[i]);
    check_dense(name_of(kMultiBwd, i).c_str(), "dy", call.dy[i]);
    TORCH_CHECK_VALUE(call.dy[i].dim() >= 1, name_of(kMultiBwd, i),
                      ": dy: got a 0-d tensor, expected [..., out_features]");
  }
}

std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd_meta(const LoraLinearMultiCall& call,
                                                                  at::IntArrayRef return_h) {
  TensorVector y, h;
  for (const LayerOfMulti& layer : checked_layers_of(call, return_h)) {
    const bool keeps = layer.adapted && return_h[y.size()] != 0;
    const auto compute = at::toOpMathType(layer.lora_A.scalar_type());
    const auto options = at::TensorOptions().dtype(compute);
    h.push_back(keeps ? layer.lora_A.new_empty_symint(
                            {count_rows(call.x), layer.lora_A.sym_size(0)}, options)
                      : layer.lora_A.new_empty_symint({0}, options));
    y.push_back(call.x.new_empty_symint(with_width(call.x, layer.weight.sym_size(0))));
  }
  return {y, h};
}

MultiGradients lora_linear_multi_bwd_meta(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                          at::IntArrayRef wanted, OptionalType dx_type) {
  const auto layers = checked_layers_of(call, wants_x, wanted);
  MultiGradients all = no_gradients(layers.size());
  const c10::SymInt K = columns_of(call);
  const Tensor dx = gradient_or_empty(wants_x, call.dy[0], with_width(call.dy[0], K));
  std::get<kGradX>(all) = wants_x && dx_type.has_value() ? at::empty_like(dx, *dx_type) : dx;
  size_t i = 0;
  for (const BackwardLayerOfMulti& layer : layers) {
    const Tensor& dy = layer.dy;
    const c10::SymInt N = dy.sym_size(-1);
    put_gradients(all, i++,
                  {Tensor(), gradient_or_empty(layer.mask[kGradWeight], dy, {N, K}),
                   gradient_or_empty(layer.mask[kGradBias], dy, N),
                   gradient_or_empty(layer.mask[kGradA], layer.lora_A),
                   gradient_or_empty(layer.mask[kGradB], layer.lora_B),
                   gradient_or_empty(layer.mask[kGradLoraBias], layer.lora_B, N)});
  }
  return all;
}

}  // namespace

void check_adapter_is_whole(const std::string& name, const Tensor& lora_A, const Tensor& lora_B) {
  TORCH_CHECK_VALUE(is_none(lora_A) == is_none(lora_B), name, ": ",
                    is_none(lora_A) ? "lora_A" : "lora_B",
                    ": got none, expected both lora_A and "
                    "lora_B, or neither for a layer without adapter");
}

void check_lora_linear_multi_lists(const LoraLinearMultiCall& call) {
  const size_t layers = call.weight.size();
  TORCH_CHECK_VALUE(layers > 0, kMulti, ": weight: got no layers, expected at least one");
  check_entries(kMulti, "bias", call.bias.size(), layers, true);
  check_entries(kMulti, "lora_A", call.lora_A.size(), layers);
  check_entries(kMulti, "lora_B", call.lora_B.size(), layers);
  check_entries(kMulti, "lora_bias", call.lora_bias.size(), layers, true);
  check_entries(kMulti, "scaling", call.scaling.size(), layers);
  check_entries(kMulti, "scaling_tensor", call.scaling_tensor.size(), layers, true);
  check_entries(kMulti, "dropout_p", call.dropout_p.size(), layers);
  check_entries(kMulti, "rng_state", call.rng_state.size(), layers, true);
  check_dense(kMulti, "x", call.x);
  TORCH_CHECK_VALUE(call.x.dim() >= 1, kMulti,
                    ": x: got a 0-d tensor, expected [..., in_features]");
  for (size_t i = 0; i < layers; ++i) {
    check_adapter_is_whole(name_of(kMulti, i), call.lora_A[i], call.lora_B[i]);
  }
}

std::vector<LayerOfMulti> layers_of(const LoraLinearMultiCall& call) {
  check_lora_linear_multi_lists(call);
  std::vector<LayerOfMulti> layers;
  layers.reserve(call.weight.size());
  for (size_t i = 0; i < call.weight.size(); ++i) {
    const bool adapted = !is_none(call.lora_A[i]);
    const auto without = [&](c10::SymInt rows, c10::SymInt columns) {
      return call.x.new_empty_symint({std::move(rows), std::move(columns)});
    };
    layers.push_back({adapted,
                      call.x,
                      call.weight[i],
                      entry(call.bias, i),
                      adapted ? call.lora_A[i] : without(0, call.x.sym_size(-1)),
                      adapted
                          ? call.lora_B[i]
                          : without(call.weight[i].dim() > 0 ? call.weight[i].sym_size(0) : 0, 0),
                      entry(call.lora_bias, i),
                      {call.scaling[i], entry(call.scaling_tensor, i)},
                      dropout_of(adapted, call.dropout_p, call.rng_state, i)});
  }
  return layers;
}

std::vector<BackwardLayerOfMulti> layers_of(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                            at::IntArrayRef wanted) {
  check_backward_lists(call, wanted);
  std::vector<BackwardLayerOfMulti> layers;
  layers.reserve(call.dy.size());
  const c10::SymInt K = columns_of(call);
  for (size_t i = 0; i < call.dy.size(); ++i) {
    const Tensor& dy = call.dy[i];
    const bool adapted = !is_none(call.lora_A[i]);
    GradientMask mask{};
    mask[kGradX] = wants_x;
    for (int gradient = kGradX + 1; gradient < kGradients; ++gradient) {
      mask[gradient] = (wanted[i] >> gradient) & 1;
    }
    layers.push_back({adapted,
                      dy,
                      call.x,
                      entry(call.h, i),
                      entry(call.weight, i),
                      adapted ? call.lora_A[i] : dy.new_empty_symint({0, K}),
                      adapted ? call.lora_B[i] : dy.new_empty_symint({dy.sym_size(-1), 0}),
                      {call.scaling[i], entry(call.scaling_tensor, i)},
                      dropout_of(adapted, call.dropout_p, call.rng_state, i),
                      mask});
  }
  return layers;
}

std::vector<LayerOfMulti> checked_layers_of(const LoraLinearMultiCall& call,
                                            at::IntArrayRef return_h) {
  std::vector<LayerOfMulti> layers = layers_of(call);
  check_entries(kMulti, "return_h", return_h.size(), layers.size());
  size_t i = 0;
  for (const LayerOfMulti& layer : layers) {
    const std::string name = name_of(kMulti, i++);
    TORCH_CHECK_VALUE(layer.adapted || !layer.lora_bias.has_value(), name,
                      ": lora_bias: got one without lora_A and lora_B, expected none");
    check_lora_linear(layer.call(), name.c_str());
  }
  return layers;
}

std::vector<BackwardLayerOfMulti> checked_layers_of(const LoraLinearMultiBackwardCall& call,
                                                    bool wants_x, at::IntArrayRef wanted) {
  std::vector<BackwardLayerOfMulti> layers = layers_of(call, wants_x, wanted);
  size_t i = 0;
  for (const BackwardLayerOfMulti& layer : layers) {
    const std::string name = name_of(kMultiBwd, i);
    TORCH_CHECK_VALUE(layer.dy.sym_sizes().slice(0, layer.dy.dim() - 1) ==
                          call.dy[0].sym_sizes().slice(0, call.dy[0].dim() - 1),
                      name, ": dy: got shape ", layer.dy.sym_sizes(),
                      ", expected the rows of the first one's ", call.dy[0].sym_sizes());
    TORCH_CHECK_VALUE(layer.adapted || (wanted[i] >> kGradA) == 0, name, ": wanted: got ",
                      wanted[i], ", expected no gradients of an adapter, of which there is none");
    check_lora_linear_bwd(layer.call(), layer.mask, name.c_str());
    ++i;
  }
  return layers;
}

MultiGradients no_gradients(size_t layers) {
  const TensorVector none(layers);
  return {Tensor(), none, none, none, none, none};
}

void put_gradients(MultiGradients& all, size_t layer, const Gradients& own) {
  std::get<kGradWeight>(all)[layer] = std::get<kGradWeight>(own);
  std::get<kGradBias>(all)[layer] = std::get<kGradBias>(own);
  std::get<kGradA>(all)[layer] = std::get<kGradA>(own);
  std::get<kGradB>(all)[layer] = std::get<kGradB>(own);
  std::get<kGradLoraBias>(all)[layer] = std::get<kGradLoraBias>(own);
}

std::tuple<Tensor, Tensor> layer_fwd(const LayerOfMulti& layer, bool return_h, LayerForward fwd) {
  if (layer.adapted) return fwd(layer.call(), return_h);
  const auto compute = at::toOpMathType(layer.x.scalar_type());
  return {at::linear(layer.x, layer.weight, layer.bias),
          at::empty({0}, layer.x.options().dtype(compute))};
}

Gradients layer_bwd(const BackwardLayerOfMulti& layer, LayerBackward bwd) {
  if (layer.adapted) return bwd(layer.call(), layer.mask);
  GradientMask others = layer.mask;
  others[kGradX] = false;
  Gradients gradients = lora_linear_prepare_bwd(layer.call(), others).gradients;
  if (layer.mask[kGradX]) {
    std::get<kGradX>(gradients) = product(as_rows(layer.dy), *layer.weight)
                                      .view_symint(with_width(layer.dy, layer.weight->sym_size(1)));
  }
  return gradients;
}

std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd_composed(
    const LoraLinearMultiCall& call, at::IntArrayRef return_h) {
  TensorVector y, h;
  for (const LayerOfMulti& layer : checked_layers_of(call, return_h)) {
    auto [own_y, own_h] = layer_fwd(layer, return_h[y.size()] != 0, &lora_linear_fwd);
    y.push_back(own_y), h.push_back(own_h);
  }
  return {y, h};
}

MultiGradients separate_gradients(const std::vector<BackwardLayerOfMulti>& layers,
                                  LayerBackward bwd, OptionalType dx_type) {
  MultiGradients all = no_gradients(layers.size());
  Tensor& dx = std::get<kGradX>(all);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Gradients own = layer_bwd(layers[i], bwd);
    put_gradients(all, i, own);
    const Tensor& term = std::get<kGradX>(own);
    if (i > 0 && layers[i].mask[kGradX]) {
      dx.add_(term);
    } else {
      dx = layers[i].mask[kGradX] && dx_type.has_value() ? term.to(*dx_type) : term;
    }
  }
  return all;
}

MultiGradients lora_linear_multi_bwd_composed(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                              at::IntArrayRef wanted, OptionalType dx_type) {
  return separate_gradients(checked_layers_of(call, wants_x, wanted), &lora_linear_bwd, dx_type);
}

TensorVector lora_linear_multi(const LoraLinearMultiCall& call, bool cast_x) {
  static const Operator<&lora_linear_multi> op("lora_ext::lora_linear_multi");
  return op(call, cast_x);
}

std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd(const LoraLinearMultiCall& call,
                                                             at::IntArrayRef return_h) {
  static const Operator<&lora_linear_multi_fwd> op("lora_ext::lora_linear_multi_fwd");
  return op(call, return_h);
}

MultiGradients lora_linear_multi_bwd(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                     at::IntArrayRef wanted, OptionalType dx_type) {
  static const Operator<&lora_linear_multi_bwd> op("lora_ext::lora_linear_multi_bwd");
  return op(call, wants_x, wanted, dx_type);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_linear_multi(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor[] lora_bias, float[] scaling, Tensor[] scaling_tensor, "
      "float[] dropout_p, Tensor[] rng_state, bool cast_x=False) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_multi_fwd(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor[] lora_bias, float[] scaling, Tensor[] scaling_tensor, "
      "float[] dropout_p, Tensor[] rng_state, int[] return_h) -> (Tensor[] y, Tensor[] h)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_multi_bwd(Tensor[] dy, Tensor? x, Tensor[] h, Tensor[] weight, "
      "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, Tensor[] scaling_tensor, "
      "float[] dropout_p, Tensor[] rng_state, bool wants_x, int[] wanted, "
      "ScalarType? dx_type=None) -> (Tensor dx, Tensor[] dweight, Tensor[] dbias, "
      "Tensor[] dlora_A, Tensor[] dlora_B, Tensor[] dlora_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear_multi_fwd", flat<&lora_linear_multi_fwd_meta>);
  m.impl("lora_linear_multi_bwd", flat<&lora_linear_multi_bwd_meta>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_multi_fwd", flat<&lora_linear_multi_fwd_composed>);
  m.impl("lora_linear_multi_bwd", flat<&lora_linear_multi_bwd_composed>);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_multi_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_multi_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
