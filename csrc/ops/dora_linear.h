// dora_linear: what DoRA with dropout makes of x, as PEFT defines it, with d = dropout(x):
//
//   y = x W^T + (scale - 1) * v + scaling * d A^T B^T + bias,      v = d W^T
//
// `dora_linear` is the operator to call; `_fwd` and `_bwd` are pure and what backends implement. W
// is frozen: with a weight that requires grad `dora_linear` is a composition of other operators.
#pragma once

#include "ops/checks.h"
#include "ops/lora_linear.h"

namespace lora_ext {

// Positions in the gradients of `_bwd`.
enum DoraGradient { kDoraX, kDoraBias, kDoraA, kDoraB, kDoraScale, kDoraGradients };
using DoraMask = std::array<bool, kDoraGradients>;
using DoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

using DoraLinearSignature = Tensor(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& lora_A,
                                   const Tensor& lora_B, const Tensor& scale, double scaling,
                                   double dropout_p, const Tensor& rng_state);

// (y, v), both [..., N]
using DoraLinearFwdSignature = std::tuple<Tensor, Tensor>(const Tensor& x,             // [..., K]
                                                          const Tensor& weight,        // [N, K]
                                                          const OptionalTensor& bias,  // [N]
                                                          const Tensor& lora_A,        // [r, K]
                                                          const Tensor& lora_B,        // [N, r]
                                                          const Tensor& scale,         // [N]
                                                          double scaling, double dropout_p,
                                                          const Tensor& rng_state);

// Gradients whose mask is false come back empty; that of scale is in float (for double, double).
// Needed: weight for that of x; x for those of lora_A and lora_B; v for that of scale.
using DoraLinearBwdSignature = DoraGradients(const Tensor& dy,              // [..., N]
                                             const OptionalTensor& x,       // [..., K]
                                             const OptionalTensor& v,       // [..., N]
                                             const OptionalTensor& weight,  // [N, K]
                                             const Tensor& lora_A,          // [r, K]
                                             const Tensor& lora_B,          // [N, r]
                                             const Tensor& scale,           // [N]
                                             double scaling, double dropout_p,
                                             const Tensor& rng_state, DoraMask mask);

// Out of other operators, with a second dense product: for any device.
DoraLinearFwdSignature dora_linear_fwd_composed;
DoraLinearBwdSignature dora_linear_bwd_composed;

inline void check_dora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                              const LoraScale& lora_scale) {
  constexpr const char* op = "dora_linear";
  check_lora_linear(x, weight, bias, lora_A, lora_B, std::nullopt, lora_scale, op);
  check_factor(op, "scale", scale, x, weight.sym_size(0));
  check_device(op, "rng_state", *lora_scale.rng_state, x);
  check_rng_state(op, *lora_scale.rng_state);
}

inline void check_dora_linear_bwd(const Tensor& dy, const OptionalTensor& x,
                                  const OptionalTensor& v, const OptionalTensor& weight,
                                  const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                  const LoraScale& lora_scale, const DoraMask& mask) {
  constexpr const char* op = "dora_linear_bwd";
  check_lora_linear_bwd(dy, x, std::nullopt, weight, lora_A, lora_B, lora_scale,
                        {mask[kDoraX], false, false, mask[kDoraA], mask[kDoraB], false}, op);
  check_factor(op, "scale", scale, dy, dy.sym_size(-1));
  check_device(op, "rng_state", *lora_scale.rng_state, dy);
  check_rng_state(op, *lora_scale.rng_state);
  TORCH_CHECK_VALUE(!mask[kDoraScale] || v.has_value(), op,
                    ": v: got None, expected [..., out_features] for the gradient of scale");
  if (!v.has_value()) return;
  check_device(op, "v", *v, dy);
  TORCH_CHECK_VALUE(v->sym_sizes() == dy.sym_sizes(), op, ": v: got shape ", v->sym_sizes(),
                    ", expected dy's ", dy.sym_sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == dy.scalar_type(), op, ": v: got dtype ", v->scalar_type(),
                   ", expected dy's ", dy.scalar_type());
}

}  // namespace lora_ext
