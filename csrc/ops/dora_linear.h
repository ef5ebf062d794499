// dora_linear: what DoRA with dropout makes of x, as PEFT defines it, with d = dropout(x):
//
//   y = x W^T + (scale - 1) * v + scaling * d A^T B^T + bias,      v = d W^T
//
// `dora_linear` is the operator to call; `_fwd` and `_bwd` are pure and what backends implement. W
// is frozen: with a weight that requires grad `dora_linear` is a composition of other operators.
#pragma once

#include "ops/lora_linear.h"

namespace lora_ext {

// The arguments of `dora_linear` and `_fwd`; not to be kept, as LoraLinearCall.
struct DoraLinearCall {
  const Tensor& x;             // [..., K]
  const Tensor& weight;        // [N, K]
  const OptionalTensor& bias;  // [N]
  const Tensor& lora_A;        // [r, K]
  const Tensor& lora_B;        // [N, r]
  const Tensor& scale;         // [N]: magnitude over norm
  double scaling, dropout_p;
  const Tensor& rng_state;  // [2], int64

  auto fields() const {
    return std::tie(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
  }
  // The same operands without scale.
  LoraLinearCall lora_linear() const {
    return {x,
            weight,
            bias,
            lora_A,
            lora_B,
            kNoTensor,
            {scaling, std::nullopt},
            {dropout_p, rng_state}};
  }
};

// Those of `_bwd`, without the mask.
struct DoraLinearBackwardCall {
  const Tensor& dy;              // [..., N]
  const OptionalTensor& x;       // [..., K]
  const OptionalTensor& v;       // [..., N]
  const OptionalTensor& weight;  // [N, K]
  const Tensor& lora_A;          // [r, K]
  const Tensor& lora_B;          // [N, r]
  const Tensor& scale;           // [N]
  double scaling, dropout_p;
  const Tensor& rng_state;  // [2], int64

  auto fields() const {
    return std::tie(dy, x, v, weight, lora_A, lora_B, scale, scaling, dropout_p, rng_state);
  }
  LoraLinearBackwardCall lora_linear() const {
    return {
        dy, x, kNoTensor, weight, lora_A, lora_B, {scaling, std::nullopt}, {dropout_p, rng_state}};
  }
};

// Positions in the gradients of `_bwd`.
enum DoraGradient { kDoraX, kDoraBias, kDoraA, kDoraB, kDoraScale, kDoraGradients };
using DoraMask = std::array<bool, kDoraGradients>;
using DoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Those of lora_linear_bwd that dora_linear asks for too.
inline GradientMask lora_linear_mask(const DoraMask& mask) {
  return {mask[kDoraX], false, false, mask[kDoraA], mask[kDoraB], false};
}

// The operators, through the dispatcher.
Tensor dora_linear(const DoraLinearCall& call);
std::tuple<Tensor, Tensor> dora_linear_fwd(const DoraLinearCall& call);  // (y, v), both [..., N]
// Gradients whose mask is false come back empty; that of scale is in float (for double, double).
// Needed: weight for that of x; x for those of lora_A and lora_B; v for that of scale.
DoraGradients dora_linear_bwd(const DoraLinearBackwardCall& call, DoraMask mask);

// Out of other operators, with a second dense product: for any device.
std::tuple<Tensor, Tensor> dora_linear_fwd_composed(const DoraLinearCall& call);
DoraGradients dora_linear_bwd_composed(const DoraLinearBackwardCall& call, DoraMask mask);

void check_dora_linear(const DoraLinearCall& call);
void check_dora_linear_bwd(const DoraLinearBackwardCall& call, const DoraMask& mask);

}  // namespace lora_ext
