// lora_linear: y = x W^T + scaling * dropout(x) A^T B^T + bias (+ scaling * lora_bias).
//
// Three operators. `lora_linear` is the one to call: differentiable, autocast-aware. `_fwd` and
// `_bwd` are what backends implement; they are pure, `rng_state` says which elements dropout keeps.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace lora_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What scales the low-rank product, in the order of the schemas.
struct LoraScale {
  double scaling;                 // times scaling_tensor, where there is one
  OptionalTensor scaling_tensor;  // [], floating: a compiled graph can be rescaled
  double dropout_p;
  OptionalTensor rng_state;  // [2], int64: seed and offset; present when dropout_p > 0
};

// Positions in the gradients of `_bwd`.
enum Gradient { kGradX, kGradWeight, kGradBias, kGradA, kGradB, kGradLoraBias, kGradients };
using GradientMask = std::array<bool, kGradients>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// y [..., N]; h = dropout(x) A^T as [M, r] in float (for double
// adapters double) if return_h, else empty.
std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x,                  // [..., K]
                                           const Tensor& weight,             // [N, K]
                                           const OptionalTensor& bias,       // [N]
                                           const Tensor& lora_A,             // [r, K]
                                           const Tensor& lora_B,             // [N, r]
                                           const OptionalTensor& lora_bias,  // [N]
                                           const LoraScale& scale, bool return_h);

// Gradients whose mask is false come back empty. Needed: weight for that of x; x for those of
// weight and lora_A; h or x for that of lora_B.
Gradients lora_linear_bwd(const Tensor& dy,              // [..., N]
                          const OptionalTensor& x,       // [..., K]
                          const OptionalTensor& h,       // [M, r]
                          const OptionalTensor& weight,  // [N, K]
                          const Tensor& lora_A,          // [r, K]
                          const Tensor& lora_B,          // [N, r]
                          const LoraScale& scale, const GradientMask& mask);

// The differentiable operator, through the dispatcher.
Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& lora_bias,
                   const LoraScale& scale);

}  // namespace lora_ext
