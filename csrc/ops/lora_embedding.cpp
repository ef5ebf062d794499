// Schemas, dispatcher handles, Meta kernels of lora_embedding, and its composition of ATen.
#include "ops/lora_embedding.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operator.h"
#include "ops/tensors.h"

namespace lora_ext {
namespace {

using Mask = std::array<bool, 2>;

Tensor lora_embedding_fwd_meta(const Tensor& indices, const Tensor& weight, const Tensor& lora_A,
                               const Tensor& lora_B, double) {
  check_lora_embedding(indices, weight, lora_A, lora_B);
  auto sizes = indices.sym_sizes().vec();
  sizes.push_back(weight.sym_size(1));
  return weight.new_empty_symint(sizes);
}

AdapterGradients lora_embedding_bwd_meta(const Tensor& dy, const Tensor& indices,
                                         const Tensor& lora_A, const Tensor& lora_B, double,
                                         int64_t padding_idx, bool, Mask mask) {
  check_lora_embedding_bwd(dy, indices, lora_A, lora_B, padding_idx);
  const auto gradient = [](bool wanted, const Tensor& like) {
    return like.new_empty_symint(wanted ? like.sym_sizes().vec() : std::vector<c10::SymInt>{0});
  };
  return {gradient(mask[0], lora_A), gradient(mask[1], lora_B)};
}

Tensor fwd_composed(const Tensor& indices, const Tensor& weight, const Tensor& lora_A,
                    const Tensor& lora_B, double scaling) {
  check_lora_embedding(indices, weight, lora_A, lora_B);
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const Tensor h = at::embedding(lora_A.t(), indices).to(compute);
  const Tensor update = at::matmul(h, lora_B.t().to(compute));
  return at::embedding(weight, indices).add(update, scaling).to(weight.scalar_type());
}

AdapterGradients bwd_composed(const Tensor& dy, const Tensor& indices, const Tensor& lora_A,
                              const Tensor& lora_B, double scaling, int64_t padding_idx,
                              bool scale_grad_by_freq, Mask mask) {
  check_lora_embedding_bwd(dy, indices, lora_A, lora_B, padding_idx);
  auto [dA, dB] = lora_embedding_bwd_composed(dy, indices, lora_A, lora_B, scaling,
                                              {padding_idx, scale_grad_by_freq}, mask);
  return {mask[0] ? dA.contiguous() : lora_A.new_empty({0}),
          mask[1] ? dB.contiguous() : lora_B.new_empty({0})};
}

}  // namespace

Tensor lora_embedding_fwd(const Tensor& indices, const Tensor& weight, const Tensor& lora_A,
                          const Tensor& lora_B, double scaling) {
  static const auto op = find_op<decltype(lora_embedding_fwd_meta)>("lora_ext::lora_embedding_fwd");
  return op.call(indices, weight, lora_A, lora_B, scaling);
}

AdapterGradients lora_embedding_bwd(const Tensor& dy, const Tensor& indices, const Tensor& lora_A,
                                    const Tensor& lora_B, double scaling,
                                    const LookupOptions& lookup, Mask mask) {
  static const auto op = find_op<decltype(lora_embedding_bwd_meta)>("lora_ext::lora_embedding_bwd");
  return op.call(dy, indices, lora_A, lora_B, scaling, lookup.padding_idx,
                 lookup.scale_grad_by_freq, mask);
}

AdapterGradients lora_embedding_bwd_composed(const Tensor& dy, const Tensor& indices,
                                             const Tensor& lora_A, const Tensor& lora_B,
                                             double scaling, const LookupOptions& lookup,
                                             Mask mask) {
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const Tensor scaled = dy.to(compute) * scaling;
  Tensor dA, dB;
  if (mask[0]) {
    const Tensor dh = at::matmul(scaled, lora_B.to(compute));
    dA = at::embedding_dense_backward_symint(dh, indices, lora_A.sym_size(1), lookup.padding_idx,
                                             lookup.scale_grad_by_freq)
             .t()
             .to(lora_A.scalar_type());
  }
  if (mask[1]) {
    const Tensor h =
        at::embedding_symint(lora_A.t(), indices, lookup.padding_idx, lookup.scale_grad_by_freq);
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
  m.impl("lora_embedding_fwd", &lora_embedding_fwd_meta);
  m.impl("lora_embedding_bwd", &lora_embedding_bwd_meta);
}

// Every device without kernels of its own.
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_embedding_fwd", &fwd_composed);
  m.impl("lora_embedding_bwd", &bwd_composed);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_embedding_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_embedding_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
