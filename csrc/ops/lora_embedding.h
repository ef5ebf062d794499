// lora_embedding: y = weight[indices] + scaling * lora_A^T[indices] lora_B^T.
//
// Three operators, as for lora_linear: `lora_embedding` is differentiable; `_fwd` and `_bwd` are
// what backends implement. Without a backend of their own, devices run compositions of ATen.
#pragma once

#include <array>
#include <tuple>

#include "ops/tensors.h"

namespace lora_ext {

// How the lookup's gradient counts tokens, as in torch.nn.Embedding.
struct LookupOptions {
  int64_t padding_idx;  // this token has none; -1: all have
  bool scale_grad_by_freq;
};

// The arguments of `_fwd`; not to be kept, as LoraLinearCall.
struct LoraEmbeddingCall {
  const Tensor& indices;  // [...]
  const Tensor& weight;   // [V, D]
  const Tensor& lora_A;   // [r, V]
  const Tensor& lora_B;   // [D, r]
  double scaling;

  auto fields() const { return std::tie(indices, weight, lora_A, lora_B, scaling); }
};

// Those of `_bwd`, without the mask.
struct LoraEmbeddingBackwardCall {
  const Tensor& dy;       // [..., D]
  const Tensor& indices;  // [...]
  const Tensor& lora_A;   // [r, V]
  const Tensor& lora_B;   // [D, r]
  double scaling;
  LookupOptions lookup;

  auto fields() const {
    return std::tie(dy, indices, lora_A, lora_B, scaling, lookup.padding_idx,
                    lookup.scale_grad_by_freq);
  }
};

using AdapterMask = std::array<bool, 2>;
using AdapterGradients = std::tuple<Tensor, Tensor>;  // of lora_A and lora_B

// The operators, through the dispatcher: y [..., D], and the gradients, of which those whose mask
// is false come back empty.
Tensor lora_embedding_fwd(const LoraEmbeddingCall& call);
AdapterGradients lora_embedding_bwd(const LoraEmbeddingBackwardCall& call, AdapterMask mask);

// The same gradients out of differentiable ATen operators; undefined where the mask is false.
AdapterGradients lora_embedding_bwd_decomposed(const LoraEmbeddingBackwardCall& call,
                                               AdapterMask mask);

// Both out of ATen's operators, for what has no kernel.
Tensor lora_embedding_fwd_composed(const LoraEmbeddingCall& call);
AdapterGradients lora_embedding_bwd_composed(const LoraEmbeddingBackwardCall& call,
                                             AdapterMask mask);

void check_lora_embedding(const LoraEmbeddingCall& call);
void check_lora_embedding_bwd(const LoraEmbeddingBackwardCall& call);
// -1 stands for none of the V tokens.
void check_padding_idx(const char* op, int64_t padding_idx, const c10::SymInt& V);

}  // namespace lora_ext
