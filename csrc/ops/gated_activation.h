// What stands between the projections of an MLP: a = f(e) * g, where f is SiLU or another of these.
// Values and roundings are those of torch.nn.functional's f and of a product, also in the
// gradients.
#pragma once

#include <string_view>

#include "ops/tensors.h"

namespace lora_ext {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// By its name in Python: "silu", "gelu", "gelu_tanh", "relu" or "relu2" (relu squared).
Activation activation_of(const char* op, std::string_view name);

// Out of ATen's differentiable operators.
Tensor activation(const Tensor& e, Activation f);
Tensor activation_backward(const Tensor& df, const Tensor& e, Activation f);

// Of [M, N] each, below autograd: a backend has its own.
struct GatedOps {
  // out = f(e) * g
  void (*forward)(const Tensor& out, const Tensor& e, const Tensor& g, Activation f);
  // de and dg of da. They may be da, and any tensor that is not read here.
  void (*backward)(const Tensor& de, const Tensor& dg, const Tensor& da, const Tensor& e,
                   const Tensor& g, Activation f);
};
// Out of ATen's operators.
void gated_out(const Tensor& out, const Tensor& e, const Tensor& g, Activation f);
void gated_backward_out(const Tensor& de, const Tensor& dg, const Tensor& da, const Tensor& e,
                        const Tensor& g, Activation f);
inline constexpr GatedOps kGatedComposed{&gated_out, &gated_backward_out};

}  // namespace lora_ext
