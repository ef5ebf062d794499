// lora_embedding: y = weight[indices] + scaling * lora_A^T[indices] lora_B^T.
//
// Three operators, as for lora_linear: `lora_embedding` is differentiable; `_fwd` and `_bwd` are
// what backends implement. Without a backend of their own, devices run compositions of ATen.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace lora_ext {

using at::Tensor;

// How the lookup's gradient counts tokens, as in torch.nn.Embedding.
struct LookupOptions {
  int64_t padding_idx;  // this token has none; -1: all have
  bool scale_grad_by_freq;
};

using AdapterGradients = std::tuple<Tensor, Tensor>;  // of lora_A and lora_B

// y [..., D]
Tensor lora_embedding_fwd(const Tensor& indices,  // [...]
                          const Tensor& weight,   // [V, D]
                          const Tensor& lora_A,   // [r, V]
                          const Tensor& lora_B,   // [D, r]
                          double scaling);

// Gradients of lora_A and lora_B; those whose mask is false come back empty.
AdapterGradients lora_embedding_bwd(const Tensor& dy,       // [..., D]
                                    const Tensor& indices,  // [...]
                                    const Tensor& lora_A,   // [r, V]
                                    const Tensor& lora_B,   // [D, r]
                                    double scaling, const LookupOptions& lookup,
                                    std::array<bool, 2> mask);

// The same gradients out of differentiable ATen operators.
AdapterGradients lora_embedding_bwd_composed(const Tensor& dy, const Tensor& indices,
                                             const Tensor& lora_A, const Tensor& lora_B,
                                             double scaling, const LookupOptions& lookup,
                                             std::array<bool, 2> mask);

}  // namespace lora_ext
