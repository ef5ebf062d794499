#include "ops/gated_activation.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace lora_ext {
Activation activation_of(const char* op, std::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  TORCH_CHECK_VALUE(false, op, ": activation: got '", name,
                    "', expected 'silu', 'gelu', 'gelu_tanh', 'relu' or 'relu2'");
}

Tensor activation(const Tensor& e, Activation f) {
  switch (f) {
    case Activation::kSilu:
      return at::silu(e);
    case Activation::kGelu:
      return at::gelu(e);
    case Activation::kGeluTanh:
      return at::gelu(e, "tanh");
    case Activation::kRelu:
      return at::relu(e);
    case Activation::kRelu2:
      return at::relu(e).square();
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor activation_backward(const Tensor& df, const Tensor& e, Activation f) {
  switch (f) {
    case Activation::kSilu: {
      if (!at::GradMode::is_enabled()) return at::silu_backward(df, e);
      const Tensor s = at::sigmoid(e);  // at::silu_backward has no derivative
      return df * (s * (1 + e * (1 - s)));
    }
    case Activation::kGelu:
      return at::gelu_backward(df, e);
    case Activation::kGeluTanh:
      return at::gelu_backward(df, e, "tanh");
    case Activation::kRelu:
      return at::threshold_backward(df, e, 0);
    case Activation::kRelu2:
      return df * (at::relu(e) * 2);  // 0 where e is not positive
  }
  TORCH_INTERNAL_ASSERT(false);
}

void gated_out(const Tensor& out, const Tensor& e, const Tensor& g, Activation f) {
  Tensor into = out;
  at::mul_out(into, activation(e, f), g);
}

void gated_backward_out(const Tensor& de, const Tensor& dg, const Tensor& da, const Tensor& e,
                        const Tensor& g, Activation f) {
  const Tensor df = da * g;
  Tensor into = dg;
  at::mul_out(into, da, activation(e, f));
  de.copy_(activation_backward(df, e, f));
}

}  // namespace lora_ext
