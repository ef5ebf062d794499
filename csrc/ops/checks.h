// The checks that all backends share. A message says: operator, argument, got, expected, what to
// do. Sizes are compared as SymInt, so the same code serves the Meta kernels under torch.compile.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include "ops/lora_linear.h"
#include "ops/tensors.h"

namespace lora_ext {

inline bool is_lora_base_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// Adapters have the base's dtype, or stay fp32 on a bf16 or fp16 base.
inline bool is_adapter_dtype(at::ScalarType adapter, at::ScalarType base) {
  return adapter == base || (adapter == at::kFloat && (base == at::kBFloat16 || base == at::kHalf));
}

// Kernels read memory by strides: no sparse or blocked layout.
inline void check_dense(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", name, ": got a tensor of layout ",
                   tensor.layout(), ", expected a dense one; convert it with .to_dense()");
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_dense(op, name, tensor);
  TORCH_CHECK(tensor.device() == x.device(), op, ": ", name, ": got device ", tensor.device(),
              ", expected ", x.device(), ", where the input is; move one of them with .to()");
}

inline void check_vector(const char* op, const char* name, const OptionalTensor& vector,
                         const Tensor& x, const c10::SymInt& N, at::ScalarType dtype) {
  if (!vector.has_value()) return;
  check_device(op, name, *vector, x);
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->sym_size(0) == N, op, ": ", name, ": got shape ",
                    vector->sym_sizes(), ", expected [", N, "], one entry per output feature");
  TORCH_CHECK_TYPE(vector->scalar_type() == dtype, op, ": ", name, ": got dtype ",
                   vector->scalar_type(), ", expected ", dtype, "; convert it with .to()");
}

// A vector that kernels read in their compute type, so of any floating dtype.
inline void check_factor(const char* op, const char* name, const OptionalTensor& vector,
                         const Tensor& x, const c10::SymInt& N) {
  if (!vector.has_value()) return;
  TORCH_CHECK_TYPE(is_lora_base_dtype(vector->scalar_type()), op, ": ", name, ": got dtype ",
                   vector->scalar_type(), ", expected a floating-point one; convert with .to()");
  check_vector(op, name, vector, x, N, vector->scalar_type());
}

// Before it is checked that a tensor has dimensions.
inline c10::SymInt last_size(const Tensor& tensor) {
  return tensor.dim() > 0 ? tensor.sym_size(-1) : c10::SymInt(0);
}

inline void check_adapters(const char* op, const char* name, const Tensor& x, const c10::SymInt& N,
                           const c10::SymInt& K, const Tensor& lora_A, const Tensor& lora_B) {
  const auto base = x.scalar_type();
  check_dense(op, name, x);
  TORCH_CHECK_TYPE(is_lora_base_dtype(base), op, ": ", name, ": got dtype ", base,
                   ", expected float64, float32, bfloat16 or float16; convert with .to()");
  check_device(op, "lora_A", lora_A, x);
  check_device(op, "lora_B", lora_B, x);
  TORCH_CHECK_VALUE(lora_A.dim() == 2 && lora_A.sym_size(1) == K, op, ": lora_A: got shape ",
                    lora_A.sym_sizes(), ", expected [r, ", K, "], [rank, in_features]");
  TORCH_CHECK_VALUE(
      lora_B.dim() == 2 && lora_B.sym_size(0) == N && lora_B.sym_size(1) == lora_A.sym_size(0), op,
      ": lora_B: got shape ", lora_B.sym_sizes(), ", expected [", N, ", ", lora_A.sym_size(0),
      "], [out_features, rank]");
  TORCH_CHECK_TYPE(is_adapter_dtype(lora_A.scalar_type(), base), op, ": lora_A: got dtype ",
                   lora_A.scalar_type(), " on a ", base, " base, expected ", base,
                   " (or float32 on a bfloat16 or float16 base); convert it with .to()");
  TORCH_CHECK_TYPE(lora_B.scalar_type() == lora_A.scalar_type(), op, ": lora_B: got dtype ",
                   lora_B.scalar_type(), ", expected lora_A's ", lora_A.scalar_type());
}

inline void check_dropout_p(const char* op, double dropout_p) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p: got ", dropout_p,
                    ", expected a probability from 0 to 1");
}

inline void check_rng_state(const char* op, const Tensor& state) {
  TORCH_CHECK_VALUE(state.scalar_type() == at::kLong && state.dim() == 1 && state.sym_size(0) == 2,
                    op, ": rng_state: got ", state.scalar_type(), " of shape ", state.sym_sizes(),
                    ", expected an int64 tensor [2] from draw_rng_state(x)");
}

inline void check_scale(const char* op, const Tensor& x, const LoraScale& scale) {
  check_dropout_p(op, scale.dropout_p);
  if (scale.scaling_tensor.has_value()) {
    const Tensor& tensor = *scale.scaling_tensor;
    TORCH_CHECK_VALUE(tensor.dim() == 0 && at::isFloatingType(tensor.scalar_type()), op,
                      ": scaling: got a ", tensor.scalar_type(), " tensor of shape ",
                      tensor.sym_sizes(), ", expected a number or a floating-point 0-d tensor");
    TORCH_CHECK_VALUE(!tensor.requires_grad(), op,
                      ": scaling: got a tensor that requires grad, expected a constant; "
                      "multiply lora_B by it to train it, or detach it");
    check_device(op, "scaling", tensor, x);
  }
  if (scale.dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(scale.rng_state.has_value(), op, ": rng_state: got None with dropout_p ",
                    scale.dropout_p, ", expected an int64 tensor [2] from draw_rng_state(x)");
  check_device(op, "rng_state", *scale.rng_state, x);
  check_rng_state(op, *scale.rng_state);
}

inline void check_weight(const char* op, const Tensor& x, const Tensor& weight,
                         const c10::SymInt& K) {
  check_device(op, "weight", weight, x);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == K, op, ": weight: got shape ",
                    weight.sym_sizes(), ", expected [out_features, ", K,
                    "], in_features being the input's last dimension");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": weight: got dtype ",
                   weight.scalar_type(), ", expected the input's ", x.scalar_type(),
                   "; convert one of them with .to(), or use torch.autocast");
}

// Where weight and lora_A agree, it is x that does not fit, and not the weight.
inline void check_input(const char* op, const Tensor& x, const Tensor& weight,
                        const Tensor& lora_A) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x: got a 0-d tensor, expected [..., in_features]");
  TORCH_CHECK_TYPE(is_lora_base_dtype(x.scalar_type()), op, ": x: got dtype ", x.scalar_type(),
                   ", expected float64, float32, bfloat16 or float16; convert with .to()");
  const bool others_agree =
      weight.dim() == 2 && lora_A.dim() == 2 && weight.sym_size(1) == lora_A.sym_size(1);
  TORCH_CHECK_VALUE(!others_agree || x.sym_size(-1) == weight.sym_size(1), op, ": x: got shape ",
                    x.sym_sizes(), ", expected [..., ", weight.sym_size(1),
                    "], in_features being the second dimension of weight and lora_A");
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const Tensor& lora_A, const Tensor& lora_B,
                              const OptionalTensor& lora_bias, const LoraScale& scale,
                              const char* op = "lora_linear") {
  check_dense(op, "x", x);
  check_input(op, x, weight, lora_A);
  check_weight(op, x, weight, x.sym_size(-1));
  const c10::SymInt N = weight.sym_size(0);
  check_adapters(op, "x", x, N, x.sym_size(-1), lora_A, lora_B);
  check_vector(op, "bias", bias, x, N, x.scalar_type());
  check_vector(op, "lora_bias", lora_bias, x, N, lora_B.scalar_type());
  check_scale(op, x, scale);
}

inline void check_lora_linear_bwd(const Tensor& dy, const OptionalTensor& x,
                                  const OptionalTensor& h, const OptionalTensor& weight,
                                  const Tensor& lora_A, const Tensor& lora_B,
                                  const LoraScale& scale, const GradientMask& mask,
                                  const char* op = "lora_linear_bwd") {
  check_dense(op, "dy", dy);
  TORCH_CHECK_VALUE(dy.dim() >= 1, op, ": dy: got a 0-d tensor, expected [..., out_features]");
  check_adapters(op, "dy", dy, dy.sym_size(-1), last_size(lora_A), lora_A, lora_B);
  check_scale(op, dy, scale);
  TORCH_CHECK_VALUE(!mask[kGradX] || weight.has_value(), op,
                    ": weight: got None, expected [out_features, in_features] for the gradient "
                    "of x");
  TORCH_CHECK_VALUE(!(mask[kGradWeight] || mask[kGradA]) || x.has_value(), op,
                    ": x: got None, expected [..., in_features] for the gradient of weight or "
                    "lora_A");
  TORCH_CHECK_VALUE(!mask[kGradB] || x.has_value() || h.has_value(), op,
                    ": h: got None without x, expected [M, r] for the gradient of lora_B");
  if (weight.has_value()) {
    check_weight(op, dy, *weight, lora_A.sym_size(1));
    TORCH_CHECK_VALUE(weight->sym_size(0) == dy.sym_size(-1), op, ": weight: got shape ",
                      weight->sym_sizes(), ", expected [", dy.sym_size(-1), ", ",
                      lora_A.sym_size(1), "], [out_features, in_features]");
  }
  if (x.has_value()) {
    check_device(op, "x", *x, dy);
    TORCH_CHECK_VALUE(
        x->dim() == dy.dim() && x->sym_size(-1) == lora_A.sym_size(1) &&
            x->sym_sizes().slice(0, x->dim() - 1) == dy.sym_sizes().slice(0, dy.dim() - 1),
        op, ": x: got shape ", x->sym_sizes(), ", expected dy's ", dy.sym_sizes(),
        " with in_features ", lora_A.sym_size(1), " last");
    TORCH_CHECK_TYPE(x->scalar_type() == dy.scalar_type(), op, ": x: got dtype ", x->scalar_type(),
                     ", expected dy's ", dy.scalar_type());
  }
  if (h.has_value()) {
    check_device(op, "h", *h, dy);
    TORCH_CHECK_VALUE(
        h->dim() == 2 && h->sym_size(1) == lora_A.sym_size(0) && h->sym_size(0) == count_rows(dy),
        op, ": h: got shape ", h->sym_sizes(), ", expected [M, ", lora_A.sym_size(0),
        "] with one row per row of dy");
    const at::ScalarType compute = at::toOpMathType(lora_A.scalar_type());
    TORCH_CHECK_TYPE(h->scalar_type() == compute, op, ": h: got dtype ", h->scalar_type(),
                     ", expected ", compute, ", in which adapters of dtype ", lora_A.scalar_type(),
                     " are summed");
  }
}

inline void check_column_scale(const char* op, const char* name, const Tensor& z,
                               const Tensor& scale, const OptionalTensor& bias) {
  check_dense(op, name, z);
  TORCH_CHECK_TYPE(is_lora_base_dtype(z.scalar_type()), op, ": ", name, ": got dtype ",
                   z.scalar_type(),
                   ", expected float64, float32, bfloat16 or float16; convert with .to()");
  TORCH_CHECK_VALUE(z.dim() >= 1, op, ": ", name, ": got a 0-d tensor, expected [..., columns]");
  check_factor(op, "scale", scale, z, z.sym_size(-1));
  check_factor(op, "bias", bias, z, z.sym_size(-1));
}

// Positions in the gradients of column_scale.
enum ColumnScaleGradient { kGradZ, kGradScale, kGradOffset, kColumnScaleGradients };
using ColumnScaleMask = std::array<bool, kColumnScaleGradients>;

inline void check_column_scale_bwd(const Tensor& dy, const OptionalTensor& z, const Tensor& scale,
                                   const ColumnScaleMask& mask) {
  constexpr const char* op = "column_scale_bwd";
  check_column_scale(op, "dy", dy, scale, std::nullopt);
  TORCH_CHECK_VALUE(!mask[kGradScale] || z.has_value(), op,
                    ": z: got None, expected [..., columns] for the gradient of scale");
  if (!z.has_value()) return;
  check_device(op, "z", *z, dy);
  TORCH_CHECK_VALUE(z->sym_sizes() == dy.sym_sizes(), op, ": z: got shape ", z->sym_sizes(),
                    ", expected dy's ", dy.sym_sizes());
  TORCH_CHECK_TYPE(z->scalar_type() == dy.scalar_type(), op, ": z: got dtype ", z->scalar_type(),
                   ", expected dy's ", dy.scalar_type());
}

inline void check_dropout(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  constexpr const char* op = "dropout";
  check_dense(op, "x", x);
  TORCH_CHECK_TYPE(is_lora_base_dtype(x.scalar_type()), op, ": x: got dtype ", x.scalar_type(),
                   ", expected float64, float32, bfloat16 or float16; convert with .to()");
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x: got a 0-d tensor, expected [..., columns]");
  check_dropout_p(op, dropout_p);
  check_device(op, "rng_state", rng_state, x);
  check_rng_state(op, rng_state);
}

inline void check_dropout_mask(const Tensor& rng_state, const c10::SymInt& rows,
                               const c10::SymInt& columns, double dropout_p,
                               const c10::SymInt& first_row) {
  constexpr const char* op = "dropout_mask";
  check_dense(op, "rng_state", rng_state);
  check_rng_state(op, rng_state);
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, op, ": rows, columns: got ", rows, ", ", columns,
                    ", expected sizes of at least 0");
  TORCH_CHECK_VALUE(first_row >= 0, op, ": first_row: got ", first_row, ", expected at least 0");
  check_dropout_p(op, dropout_p);
}

inline void check_indices(const char* op, const Tensor& indices, const Tensor& table) {
  check_device(op, "indices", indices, table);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op,
                   ": indices: got dtype ", indices.scalar_type(),
                   ", expected int64 or int32; convert with .to()");
}

// -1 stands for none.
inline void check_padding_idx(const char* op, int64_t padding_idx, const c10::SymInt& V) {
  TORCH_CHECK_VALUE(padding_idx == -1 || (padding_idx >= 0 && padding_idx < V), op,
                    ": padding_idx: got ", padding_idx, ", expected a row of the ", V,
                    " of the weight, or -1 for none");
}

inline void check_lora_embedding(const Tensor& indices, const Tensor& weight, const Tensor& lora_A,
                                 const Tensor& lora_B) {
  constexpr const char* op = "lora_embedding";
  check_dense(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight: got shape ", weight.sym_sizes(),
                    ", expected [num_embeddings, embedding_dim]");
  check_indices(op, indices, weight);
  check_adapters(op, "weight", weight, weight.sym_size(1), weight.sym_size(0), lora_A, lora_B);
}

inline void check_lora_embedding_bwd(const Tensor& dy, const Tensor& indices, const Tensor& lora_A,
                                     const Tensor& lora_B, int64_t padding_idx) {
  constexpr const char* op = "lora_embedding_bwd";
  check_dense(op, "dy", dy);
  check_dense(op, "indices", indices);
  TORCH_CHECK_VALUE(dy.dim() == indices.dim() + 1 &&
                        dy.sym_sizes().slice(0, indices.dim()) == indices.sym_sizes(),
                    op, ": dy: got shape ", dy.sym_sizes(), ", expected that of indices, ",
                    indices.sym_sizes(), ", and embedding_dim last");
  check_indices(op, indices, dy);
  const c10::SymInt V = last_size(lora_A);
  check_adapters(op, "dy", dy, dy.sym_size(-1), V, lora_A, lora_B);
  check_padding_idx(op, padding_idx, V);
}

// For merge_ and weight_norm.
inline void check_merge(const char* op, const Tensor& weight, const Tensor& lora_A,
                        const Tensor& lora_B, const OptionalTensor& weight_scale) {
  check_dense(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight: got shape ", weight.sym_sizes(),
                    ", expected [out_features, in_features]");
  check_adapters(op, "weight", weight, weight.sym_size(0), weight.sym_size(1), lora_A, lora_B);
  check_factor(op, "weight_scale", weight_scale, weight, weight.sym_size(0));
}

// The operands of merge_ by rows: a transposed weight (fan_in_fan_out) is the same sum with the
// roles of A and B exchanged.
struct MergeOperands {
  Tensor weight;          // rows of adjacent elements that do not overlap
  Tensor lora_A, lora_B;  // contiguous
  bool transposed;        // rows of `weight` here are columns of what was given
};

inline MergeOperands merge_operands(const char* op, const Tensor& weight, const Tensor& lora_A,
                                    const Tensor& lora_B) {
  const bool transposed = weight.stride(1) != 1 && weight.size(1) != 1;
  const Tensor rows = transposed ? weight.t() : weight;
  const bool overlaps = rows.stride(0) < rows.size(1) && rows.size(0) > 1;
  TORCH_CHECK_VALUE((rows.stride(1) == 1 || rows.size(1) == 1) && !overlaps, op,
                    ": weight: got strides ", weight.strides(),
                    ", expected rows or columns of adjacent elements; call .contiguous()");
  return {rows, (transposed ? lora_B.t() : lora_A).contiguous(),
          (transposed ? lora_A.t() : lora_B).contiguous(), transposed};
}

inline void check_merged_finite(bool finite, const Tensor& weight) {
  TORCH_CHECK_VALUE(finite,
                    "merge_: the merged weight would hold NaN or Inf (in the weight, lora_A, "
                    "lora_B or by overflow of ",
                    weight.scalar_type(), "), expected finite values; nothing was changed");
}

}  // namespace lora_ext
