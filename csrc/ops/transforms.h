// Forward-mode AD and torch.func's transforms. Kernels know neither tangents nor batches: where one
// of these is at work, an operator is its form out of ATen's operators (`<op>_decomposed`), which
// know both. A call without them asks for nothing but the tangents of its operands.
//
// torch.func's come first of all: an operator's kernel for FuncTorchDynamicLayerFrontMode is its
// decomposed form, whose operators then pass through every transform.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace lora_ext {

inline bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && has_tangent(*tensor);
}
template <class... Operands>
bool have_tangents(const Operands&... operands) {
  return (has_tangent(operands) || ...);
}

// In a transform of torch.func, or a vectorised Jacobian.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether backward has to be differentiable operators: under create_graph=True, and where the
// gradient is transformed.
inline bool needs_differentiable_backward(const at::Tensor& dy) {
  return at::GradMode::is_enabled() || has_tangent(dy) || is_transformed();
}

// By torch.autograd.grad(is_grads_batched=True), whose fallback takes no lists of tensors.
inline bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched}));
}

}  // namespace lora_ext
