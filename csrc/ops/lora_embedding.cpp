// Schemas, dispatcher handles, checks, Meta kernels of lora_embedding, and its composition of ATen.
#include "ops/lora_embedding.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

Tensor lora_embedding_fwd_meta(const LoraEmbeddingCall& call) {
  check_lora_embedding(call);
  auto sizes = call.indices.sym_sizes().vec();
  sizes.push_back(call.weight.sym_size(1));
  return call.weight.new_empty_symint(sizes);
}

AdapterGradients lora_embedding_bwd_meta(const LoraEmbeddingBackwardCall& call, AdapterMask mask) {
  check_lora_embedding_bwd(call);
  return {gradient_or_empty(mask[0], call.lora_A), gradient_or_empty(mask[1], call.lora_B)};
}

void check_indices(const char* op, const Tensor& indices, const Tensor& table) {
  check_device(op, "indices", indices, table);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op,
                   ": indices: got dtype ", dtype_name(indices.scalar_type()),
                   ", expected int64 or int32; convert with .to()");
}

}  // namespace

Tensor lora_embedding_fwd_composed(const LoraEmbeddingCall& call) {
  check_lora_embedding(call);
  const auto compute = at::toOpMathType(call.lora_A.scalar_type());
  const Tensor h = at::embedding(call.lora_A.t(), call.indices).to(compute);
  const Tensor update = at::matmul(h, call.lora_B.t().to(compute));
  const Tensor base = at::embedding(call.weight, call.indices);
  return base.add(update, call.scaling).to(call.weight.scalar_type());
}

AdapterGradients lora_embedding_bwd_composed(const LoraEmbeddingBackwardCall& call,
                                             AdapterMask mask) {
  check_lora_embedding_bwd(call);
  auto [dA, dB] = lora_embedding_bwd_decomposed(call, mask);
  return {mask[0] ? dA.contiguous() : call.lora_A.new_empty({0}),
          mask[1] ? dB.contiguous() : call.lora_B.new_empty({0})};
}

void check_padding_idx(const char* op, int64_t padding_idx, const c10::SymInt& V) {
  TORCH_CHECK_VALUE(padding_idx == -1 || (padding_idx >= 0 && padding_idx < V), op,
                    ": padding_idx: got ", padding_idx, ", expected a row of the ", V,
                    " of the weight, or -1 for none");
}

void check_lora_embedding(const LoraEmbeddingCall& call) {
  constexpr const char* op = "lora_embedding";
  const Tensor& weight = call.weight;
  check_dense(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight: got shape ", weight.sym_sizes(),
                    ", expected [num_embeddings, embedding_dim]");
  check_indices(op, call.indices, weight);
  check_adapters(op, "weight", weight, weight.sym_size(1), weight.sym_size(0), call.lora_A,
                 call.lora_B);
}

void check_lora_embedding_bwd(const LoraEmbeddingBackwardCall& call) {
  constexpr const char* op = "lora_embedding_bwd";
  const Tensor &dy = call.dy, &indices = call.indices;
  check_dense(op, "dy", dy);
  check_dense(op, "indices", indices);
  TORCH_CHECK_VALUE(dy.dim() == indices.dim() + 1 &&
                        dy.sym_sizes().slice(0, indices.dim()) == indices.sym_sizes(),
                    op, ": dy: got shape ", dy.sym_sizes(), ", expected that of indices, ",
                    indices.sym_sizes(), ", and embedding_dim last");
  check_indices(op, indices, dy);
  const c10::SymInt V = last_size(call.lora_A);
  check_adapters(op, "dy", dy, dy.sym_size(-1), V, call.lora_A, call.lora_B);
  check_padding_idx(op, call.lookup.padding_idx, V);
}

Tensor lora_embedding_fwd(const LoraEmbeddingCall& call) {
  static const Operator<&lora_embedding_fwd> op("lora_ext::lora_embedding_fwd");
  return op(call);
}

AdapterGradients lora_embedding_bwd(const LoraEmbeddingBackwardCall& call, AdapterMask mask) {
  static const Operator<&lora_embedding_bwd> op("lora_ext::lora_embedding_bwd");
  return op(call, mask);
}

AdapterGradients lora_embedding_bwd_decomposed(const LoraEmbeddingBackwardCall& call,
                                               AdapterMask mask) {
  const auto &lora_A = call.lora_A, &lora_B = call.lora_B;
  const auto [padding_idx, scale_grad_by_freq] = call.lookup;
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const Tensor scaled = call.dy.to(compute) * call.scaling;
  Tensor dA, dB;
  if (mask[0]) {
    const Tensor dh = at::matmul(scaled, lora_B.to(compute));
    dA = at::embedding_dense_backward_symint(dh, call.indices, lora_A.sym_size(1), padding_idx,
                                             scale_grad_by_freq)
             .t()
             .to(lora_A.scalar_type());
  }
  if (mask[1]) {
    const Tensor h =
        at::embedding_symint(lora_A.t(), call.indices, padding_idx, scale_grad_by_freq);
    dB = at::mm(flattened(scaled).t(), flattened(h.to(compute))).to(lora_B.scalar_type());
  }
  return {dA, dB};
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_embedding(Tensor indices, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "float scaling=1.0, int padding_idx=-1, bool scale_grad_by_freq=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_embedding_fwd(Tensor indices, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "float scaling=1.0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_embedding_bwd(Tensor dy, Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, "
      "int padding_idx, bool scale_grad_by_freq, bool[2] mask) "
      "-> (Tensor dlora_A, Tensor dlora_B)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_embedding_fwd", flat<&lora_embedding_fwd_meta>);
  m.impl("lora_embedding_bwd", flat<&lora_embedding_bwd_meta>);
}

// Every device without kernels of its own.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_embedding_fwd", flat<&lora_embedding_fwd_composed>);
  m.impl("lora_embedding_bwd", flat<&lora_embedding_bwd_composed>);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_embedding_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_embedding_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
