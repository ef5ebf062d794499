// Several lora_linear of one x: the projections q, k and v of an attention, gate and up of an MLP.
// They differ freely in width, rank, scaling, dropout and the adapter's dtype; some may have no
// adapter. Each drops by a mask of its own. x is kept once for backward, and dx is one sum.
//
// Three operators, as of lora_linear: `lora_linear_multi` is the one to call, `_fwd` and `_bwd` are
// what backends implement.
#pragma once

#include <string>
#include <vector>

#include "ops/lora_linear.h"

namespace lora_ext {

// Lists have an entry for each layer; "none" is a tensor [0], or an empty list if all are none. It
// lives no longer than what it was made of.
struct LoraLinearMultiCall {
  const Tensor& x;                // [..., K]
  at::TensorList weight;          // [N, K]
  at::TensorList bias;            // [N], or none
  at::TensorList lora_A, lora_B;  // [r, K] and [N, r], or none: torch.nn.functional.linear
  at::TensorList lora_bias;       // [N], or none
  at::ArrayRef<double> scaling;
  at::TensorList scaling_tensor;  // [], or none
  at::ArrayRef<double> dropout_p;
  at::TensorList rng_state;  // int64 [2], or none: the layer drops no elements

  // The call of another x.
  LoraLinearMultiCall with(const Tensor& other) const {
    return {other,     weight,  bias,           lora_A,    lora_B,
            lora_bias, scaling, scaling_tensor, dropout_p, rng_state};
  }
  auto fields() const {
    return std::tie(x, weight, bias, lora_A, lora_B, lora_bias, scaling, scaling_tensor, dropout_p,
                    rng_state);
  }
};

struct LoraLinearMultiBackwardCall {
  at::TensorList dy;              // [..., N]
  const OptionalTensor& x;        // [..., K]
  at::TensorList h;               // [M, r], or none
  at::TensorList weight;          // [N, K], or none
  at::TensorList lora_A, lora_B;  // as above
  at::ArrayRef<double> scaling;
  at::TensorList scaling_tensor;
  at::ArrayRef<double> dropout_p;
  at::TensorList rng_state;

  auto fields() const {
    return std::tie(dy, x, h, weight, lora_A, lora_B, scaling, scaling_tensor, dropout_p,
                    rng_state);
  }
};

using OptionalType = std::optional<at::ScalarType>;

// dx, and of each layer those of weight, bias, lora_A, lora_B and lora_bias.
using MultiGradients =
    std::tuple<Tensor, TensorVector, TensorVector, TensorVector, TensorVector, TensorVector>;

// The operators, through the dispatcher. cast_x: x is cast to the weights' type, and its gradient
// is added up in its own.
TensorVector lora_linear_multi(const LoraLinearMultiCall& call, bool cast_x = false);
// y of each layer, and h of those whose return_h is not 0; the others' comes back empty.
std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd(const LoraLinearMultiCall& call,
                                                             at::IntArrayRef return_h);
// wanted[i]: a sum of 1 << kGradWeight, ... of layer i; wants_x is for all. What is not wanted
// comes back empty. Needed is what lora_linear_bwd needs. dx_type: of dx, none: dy's.
MultiGradients lora_linear_multi_bwd(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                     at::IntArrayRef wanted, OptionalType dx_type);

// Whether dx is a sum in another type than dy's, which backends leave to separate_gradients.
inline bool sums_in_other_type(const Tensor& dy, bool wants_x, OptionalType dx_type) {
  return wants_x && dx_type.value_or(dy.scalar_type()) != dy.scalar_type();
}

// x of layers of these weights, under cast_x.
inline Tensor cast_to_weight(const Tensor& x, at::TensorList weight, bool cast_x) {
  return cast_x && !weight.empty() ? x.to(weight[0].scalar_type()) : x;
}

// As calls of their own, where each is transformed. Each casts x, so that autograd adds up the
// parts of its gradient in x's type.
TensorVector lora_linear_multi_separate(const LoraLinearMultiCall& call, bool cast_x);

// One of the layers, as a call of lora_linear. Without adapter its rank is 0.
struct LayerOfMulti {
  bool adapted;
  const Tensor &x, &weight;
  OptionalTensor bias;
  Tensor lora_A, lora_B;
  OptionalTensor lora_bias;
  HiddenScale scaling;
  LoraDropout dropout;

  LoraLinearCall call() const {
    return {x, weight, bias, lora_A, lora_B, lora_bias, scaling, dropout};
  }
};
// Both of an adapter, or neither.
void check_adapter_is_whole(const std::string& name, const Tensor& lora_A, const Tensor& lora_B);
// How many entries there are, before any is read; layers_of checks it, too, and checked_layers_of
// every entry.
void check_lora_linear_multi_lists(const LoraLinearMultiCall& call);
std::vector<LayerOfMulti> layers_of(const LoraLinearMultiCall& call);
std::vector<LayerOfMulti> checked_layers_of(const LoraLinearMultiCall& call,
                                            at::IntArrayRef return_h);

struct BackwardLayerOfMulti {
  bool adapted;
  const Tensor& dy;
  const OptionalTensor& x;
  OptionalTensor h, weight;
  Tensor lora_A, lora_B;
  HiddenScale scaling;
  LoraDropout dropout;
  GradientMask mask;

  LoraLinearBackwardCall call() const {
    return {dy, x, h, weight, lora_A, lora_B, scaling, dropout};
  }
};
std::vector<BackwardLayerOfMulti> layers_of(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                            at::IntArrayRef wanted);
std::vector<BackwardLayerOfMulti> checked_layers_of(const LoraLinearMultiBackwardCall& call,
                                                    bool wants_x, at::IntArrayRef wanted);

// Without what several layers can share: a call of lora_linear for each. A backend's way where it
// has no other.
std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd_composed(
    const LoraLinearMultiCall& call, at::IntArrayRef return_h);
MultiGradients lora_linear_multi_bwd_composed(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                              at::IntArrayRef wanted, OptionalType dx_type);
// The same of checked layers, by lora_linear_fwd and lora_linear_bwd or what a backend has for
// them.
using LayerForward = std::tuple<Tensor, Tensor> (*)(const LoraLinearCall&, bool return_h);
using LayerBackward = Gradients (*)(const LoraLinearBackwardCall&, GradientMask mask);
std::tuple<Tensor, Tensor> layer_fwd(const LayerOfMulti& layer, bool return_h, LayerForward fwd);
Gradients layer_bwd(const BackwardLayerOfMulti& layer, LayerBackward bwd);
MultiGradients separate_gradients(const std::vector<BackwardLayerOfMulti>& layers,
                                  LayerBackward bwd, OptionalType dx_type);

// Of so many layers, to be filled in; and a layer's put into its place: all but dx.
MultiGradients no_gradients(size_t layers);
void put_gradients(MultiGradients& all, size_t layer, const Gradients& own);

}  // namespace lora_ext
