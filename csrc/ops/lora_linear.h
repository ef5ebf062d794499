// lora_linear: y = x W^T + scaling * dropout(x) A^T B^T + bias (+ scaling * lora_bias).
//
// Three operators. `lora_linear` is the one to call: differentiable, autocast-aware. `_fwd` and
// `_bwd` are what backends implement; they are pure, `rng_state` says which elements dropout keeps.
#pragma once

#include <array>
#include <tuple>

#include "../common/dropout.h"
#include "ops/tensors.h"

namespace lora_ext {

// What multiplies h = dropout(x) A^T, and lora_bias: a number and, where there is one, a tensor.
struct HiddenScale {
  double number;
  OptionalTensor tensor;  // [], floating: a compiled graph can be rescaled

  Tensor times(const Tensor& values) const {
    const Tensor scaled = values * number;
    return tensor.has_value() ? scaled * *tensor : scaled;
  }
  // All in the number: on the CPU. On a GPU that would wait for the device, and break the capture
  // of a CUDA graph.
  HiddenScale read() const {
    return {tensor.has_value() ? number * tensor->item<double>() : number, std::nullopt};
  }
};

// Of x, before A.
struct LoraDropout {
  double p;
  OptionalTensor rng_state;  // [2], int64: seed and offset; present when p > 0

  bool enabled() const { return p > 0.0; }
  double survivor() const { return enabled() ? dropout_scale(p) : 1.0; }  // of what is kept
};

// The arguments of `lora_linear` and, with return_h, of `_fwd`. It lives no longer than the tensors
// that it was made of: for calls down the stack, not to be kept.
struct LoraLinearCall {
  const Tensor& x;                  // [..., K]
  const Tensor& weight;             // [N, K]
  const OptionalTensor& bias;       // [N]
  const Tensor& lora_A;             // [r, K]
  const Tensor& lora_B;             // [N, r]
  const OptionalTensor& lora_bias;  // [N]
  HiddenScale scaling;
  LoraDropout dropout;

  auto fields() const {
    return std::tie(x, weight, bias, lora_A, lora_B, lora_bias, scaling.number, scaling.tensor,
                    dropout.p, dropout.rng_state);
  }
};

// Those of `_bwd`, without the mask.
struct LoraLinearBackwardCall {
  const Tensor& dy;              // [..., N]
  const OptionalTensor& x;       // [..., K]
  const OptionalTensor& h;       // [M, r]
  const OptionalTensor& weight;  // [N, K]
  const Tensor& lora_A;          // [r, K]
  const Tensor& lora_B;          // [N, r]
  HiddenScale scaling;
  LoraDropout dropout;

  auto fields() const {
    return std::tie(dy, x, h, weight, lora_A, lora_B, scaling.number, scaling.tensor, dropout.p,
                    dropout.rng_state);
  }
};

// Positions in the gradients of `_bwd`.
enum Gradient { kGradX, kGradWeight, kGradBias, kGradA, kGradB, kGradLoraBias, kGradients };
using GradientMask = std::array<bool, kGradients>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators, through the dispatcher.
Tensor lora_linear(const LoraLinearCall& call);
// y [..., N]; h = dropout(x) A^T as [M, r] in float (for double adapters double) if return_h, else
// empty.
std::tuple<Tensor, Tensor> lora_linear_fwd(const LoraLinearCall& call, bool return_h);
// Gradients whose mask is false come back empty. Needed: weight for that of x; x for those of
// weight and lora_A; h or x for that of lora_B.
Gradients lora_linear_bwd(const LoraLinearBackwardCall& call, GradientMask mask);

// The same gradients out of differentiable ATen operators, undefined where the mask is false: what
// backward() runs where they are differentiated or transformed in turn. It holds M x K temporaries.
TensorVector lora_linear_bwd_decomposed(const LoraLinearBackwardCall& call,
                                        const GradientMask& mask);

void check_lora_linear(const LoraLinearCall& call, const char* op = "lora_linear");
// Its parts: x beside a weight of these sizes, without the weight; and all but both.
void check_lora_linear_input(const Tensor& x, c10::SymIntArrayRef weight, const Tensor& lora_A,
                             const char* op);
void check_lora_linear_adapter(const LoraLinearCall& call, const c10::SymInt& N, const char* op);
void check_lora_linear_bwd(const LoraLinearBackwardCall& call, const GradientMask& mask,
                           const char* op = "lora_linear_bwd");

}  // namespace lora_ext
