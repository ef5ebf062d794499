// lora_embedding as a torch::autograd::Function.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/lora_embedding.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LoraEmbedding : torch::autograd::Function<LoraEmbedding> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& indices, const Tensor& weight,
                        const Tensor& lora_A, const Tensor& lora_B, double scaling,
                        int64_t padding_idx, bool scale_grad_by_freq) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // No [tokens, r] is kept: gathering it again from lora_A costs no more than reading it.
    ctx->save_for_backward({indices, lora_A, lora_B});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
    return lora_embedding_fwd({indices, weight, lora_A, lora_B, scaling});
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &indices = saved[0], &lora_A = saved[1], &dy = grad_outputs[0];
    const LookupOptions lookup{ctx->saved_data["padding_idx"].toInt(),
                               ctx->saved_data["scale_grad_by_freq"].toBool()};
    const LoraEmbeddingBackwardCall call{
        dy, indices, lora_A, saved[2], ctx->saved_data["scaling"].toDouble(), lookup};
    const AdapterMask mask{ctx->needs_input_grad(2), ctx->needs_input_grad(3)};

    variable_list grads(7);
    if (ctx->needs_input_grad(1)) {
      grads[1] = at::embedding_dense_backward_symint(dy, indices, lora_A.sym_size(1),
                                                     lookup.padding_idx, lookup.scale_grad_by_freq);
    }
    if (mask[0] || mask[1]) {
      const auto gradients =
          needs_differentiable_backward(dy) ? lora_embedding_bwd_decomposed : lora_embedding_bwd;
      auto [dA, dB] = gradients(call, mask);
      if (mask[0]) grads[2] = dA;
      if (mask[1]) grads[3] = dB;
    }
    return grads;
  }
};

// Out of ATen's operators (see transforms.h), in the precision that the kernels sum in.
Tensor lora_embedding_decomposed(const LoraEmbeddingCall& call, int64_t padding_idx,
                                 bool scale_grad_by_freq) {
  const auto &weight = call.weight, &lora_A = call.lora_A;
  check_lora_embedding(call);
  check_padding_idx("lora_embedding", padding_idx, weight.sym_size(0));
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const auto lookup = [&](const Tensor& table) {
    return at::embedding(table, call.indices, padding_idx, scale_grad_by_freq);
  };
  const Tensor update = at::linear(lookup(lora_A.t()).to(compute), call.lora_B.to(compute));
  return (lookup(weight) + update * call.scaling).to(weight.scalar_type());
}

// Under inference mode tensors carry no Autograd key: then only this is called.
Tensor lora_embedding_inference(const LoraEmbeddingCall& call, int64_t padding_idx, bool) {
  check_padding_idx("lora_embedding", padding_idx, last_size(call.lora_A));
  return lora_embedding_fwd(call);
}

Tensor lora_embedding_autograd(const LoraEmbeddingCall& call, int64_t padding_idx,
                               bool scale_grad_by_freq) {
  const auto& [indices, weight, lora_A, lora_B, scaling] = call;
  if (have_tangents(weight, lora_A, lora_B)) {
    return lora_embedding_decomposed(call, padding_idx, scale_grad_by_freq);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (weight.requires_grad() || lora_A.requires_grad() || lora_B.requires_grad());
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return lora_embedding_inference(call, padding_idx, scale_grad_by_freq);
  }
  check_padding_idx("lora_embedding", padding_idx, last_size(lora_A));
  return LoraEmbedding::apply(indices, weight, lora_A, lora_B, scaling, padding_idx,
                              scale_grad_by_freq);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_embedding", flat<&lora_embedding_decomposed>);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_embedding", flat<&lora_embedding_autograd>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_embedding", flat<&lora_embedding_inference>);
}

}  // namespace lora_ext
