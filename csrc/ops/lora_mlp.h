// A gated MLP as one operator: down(f(gate(x)) * up(x)), each of the three a lora_linear. Kept for
// backward are x and what gate and up made; f's values and the product are made again.
//
// Three operators, as of lora_linear: `lora_mlp` is the one to call. `_fwd` and `_bwd` are made of
// those of lora_linear_multi on every device.
#pragma once

#include "ops/gated_activation.h"
#include "ops/lora_linear_multi.h"

namespace lora_ext {

// Lists have an entry for gate, up and down, in this order; or two, where one layer of twice the
// width makes what gate makes and behind it what up makes. "none" is as in LoraLinearMultiCall.
struct LoraMlpCall {
  const Tensor& x;                // [..., K]
  at::TensorList weight;          // [I, K] twice or [2 I, K], and [N, I]
  at::TensorList bias;            // [I], ..., or none
  at::TensorList lora_A, lora_B;  // [r, K] and [I, r], ..., or none
  at::TensorList lora_bias;
  at::ArrayRef<double> scaling;
  at::TensorList scaling_tensor;
  at::ArrayRef<double> dropout_p;
  at::TensorList rng_state;
  c10::string_view activation;  // f: see activation_of

  // The call of another x.
  LoraMlpCall with(const Tensor& other) const {
    return {other,   weight,         bias,      lora_A,    lora_B,    lora_bias,
            scaling, scaling_tensor, dropout_p, rng_state, activation};
  }
  auto fields() const {
    return std::tie(x, weight, bias, lora_A, lora_B, lora_bias, scaling, scaling_tensor, dropout_p,
                    rng_state, activation);
  }
};

struct LoraMlpBackwardCall {
  const Tensor& dy;         // [..., N]
  const OptionalTensor& x;  // [..., K]
  at::TensorList made;  // by the layers of x: [..., I] twice or [..., 2 I]; or none: of x, again
  at::TensorList h;     // [M, r], or none
  at::TensorList weight, bias, lora_A, lora_B, lora_bias;  // as above
  at::ArrayRef<double> scaling;
  at::TensorList scaling_tensor;
  at::ArrayRef<double> dropout_p;
  at::TensorList rng_state;
  c10::string_view activation;

  auto fields() const {
    return std::tie(dy, x, made, h, weight, bias, lora_A, lora_B, lora_bias, scaling,
                    scaling_tensor, dropout_p, rng_state, activation);
  }
};

// The operators, through the dispatcher. recompute: of what is made nothing is kept for backward.
// cast_x and dx_type: as of lora_linear_multi.
Tensor lora_mlp(const LoraMlpCall& call, bool recompute, bool cast_x = false);
// y; what the layers of x made; h of each layer whose return_h is not 0, the others' are empty.
std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd(const LoraMlpCall& call,
                                                            at::IntArrayRef return_h);
// wanted and the gradients: as those of lora_linear_multi_bwd.
MultiGradients lora_mlp_bwd(const LoraMlpBackwardCall& call, bool wants_x, at::IntArrayRef wanted,
                            OptionalType dx_type);

// What both are out of differentiable operators.
Tensor lora_mlp_decomposed(const LoraMlpCall& call, bool cast_x);
MultiGradients lora_mlp_bwd_decomposed(const LoraMlpBackwardCall& call, bool wants_x,
                                       at::IntArrayRef wanted, OptionalType dx_type);

// The same by what a backend has for f(e) * g.
std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd_by(const LoraMlpCall& call,
                                                               at::IntArrayRef return_h,
                                                               const GatedOps& gated);
MultiGradients lora_mlp_bwd_by(const LoraMlpBackwardCall& call, bool wants_x,
                               at::IntArrayRef wanted, OptionalType dx_type, const GatedOps& gated);

void check_lora_mlp(const LoraMlpCall& call, bool cast_x = false);

// The layers of x, and the one of `a`, as calls of their own.
LoraLinearMultiCall entries_of(const LoraMlpCall& call);
LoraLinearMultiCall down_of(const LoraMlpCall& call, const Tensor& a);

}  // namespace lora_ext
