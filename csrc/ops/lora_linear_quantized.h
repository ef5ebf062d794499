// lora_linear whose base is a quantized matrix: y = x W^T + scaling * dropout(x) A^T B^T + bias
// (+ scaling * lora_bias), W of values in the dtype of x. Three operators, as of lora_linear; W has
// no gradient.
#pragma once

#include "ops/lora_linear.h"
#include "quant/quantized_weight.h"

namespace lora_ext {

struct LoraLinearQuantizedCall {
  const Tensor& x;  // [..., K]
  QuantizedWeight weight;
  const OptionalTensor& bias;       // [N]
  const Tensor& lora_A;             // [r, K]
  const Tensor& lora_B;             // [N, r]
  const OptionalTensor& lora_bias;  // [N]
  HiddenScale scaling;
  LoraDropout dropout;

  auto fields() const {
    return std::tie(x, weight.tensors, weight.layout, weight.numbers, bias, lora_A, lora_B,
                    lora_bias, scaling.number, scaling.tensor, dropout.p, dropout.rng_state);
  }
  // With another weight, for what reads the rest.
  LoraLinearCall with(const Tensor& dense) const {
    return {x, dense, bias, lora_A, lora_B, lora_bias, scaling, dropout};
  }
};

// Of `_bwd`, without the mask. The weight's tensors may be left out where dx is not wanted.
struct LoraLinearQuantizedBackwardCall {
  const Tensor& dy;         // [..., N]
  const OptionalTensor& x;  // [..., K]
  const OptionalTensor& h;  // [M, r]
  QuantizedWeight weight;
  const Tensor& lora_A;  // [r, K]
  const Tensor& lora_B;  // [N, r]
  HiddenScale scaling;
  LoraDropout dropout;

  auto fields() const {
    return std::tie(dy, x, h, weight.tensors, weight.layout, weight.numbers, lora_A, lora_B,
                    scaling.number, scaling.tensor, dropout.p, dropout.rng_state);
  }
  LoraLinearBackwardCall with(const OptionalTensor& dense) const {
    return {dy, x, h, dense, lora_A, lora_B, scaling, dropout};
  }
};

// Positions in the gradients of `_bwd`: x, bias, lora_A, lora_B, lora_bias.
using QuantizedMask = std::array<bool, 5>;
using QuantizedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline GradientMask with_weight(const QuantizedMask& mask) {
  return {mask[0], false, mask[1], mask[2], mask[3], mask[4]};
}
inline QuantizedGradients without_weight(const Gradients& gradients) {
  const auto& [dx, dweight, dbias, dA, dB, dlora_bias] = gradients;
  return {dx, dbias, dA, dB, dlora_bias};
}

Tensor lora_linear_quantized(const LoraLinearQuantizedCall& call);
std::tuple<Tensor, Tensor> lora_linear_quantized_fwd(const LoraLinearQuantizedCall& call,
                                                     bool return_h);
QuantizedGradients lora_linear_quantized_bwd(const LoraLinearQuantizedBackwardCall& call,
                                             QuantizedMask mask);

QuantizedFields check_lora_linear_quantized(const LoraLinearQuantizedCall& call);
// Without fields where dx is not wanted.
std::optional<QuantizedFields> check_lora_linear_quantized_bwd(
    const LoraLinearQuantizedBackwardCall& call, const QuantizedMask& mask);

}  // namespace lora_ext
