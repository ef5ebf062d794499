// The checks that several operators share; those of one are in its own files. A message says:
// operator, argument, got, expected, what to do. Sizes are compared as SymInt, so the same code
// serves the Meta kernels under torch.compile.
#pragma once

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

inline void check_base_dtype(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(is_lora_base_dtype(tensor.scalar_type()), op, ": ", name, ": got dtype ",
                   dtype_name(tensor.scalar_type()),
                   ", expected float64, float32, bfloat16 or float16; convert with .to()");
}

// Kernels read memory by strides: no sparse or blocked layout.
inline void check_dense(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", name, ": got a tensor of layout ",
                   tensor.layout(), ", expected a dense one; convert it with .to_dense()");
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_dense(op, name, tensor);
  TORCH_CHECK(tensor.device() == x.device(), op, ": ", name, ": got device ", tensor.device(),
              ", expected ", x.device(), ", where the input is; ",
              tensor.is_meta() ? "it has no values yet: load them, or give it some with .to_empty()"
                               : "move one of them with .to()");
}

inline void check_vector(const char* op, const char* name, const OptionalTensor& vector,
                         const Tensor& x, const c10::SymInt& N, at::ScalarType dtype) {
  if (!vector.has_value()) return;
  check_device(op, name, *vector, x);
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->sym_size(0) == N, op, ": ", name, ": got shape ",
                    vector->sym_sizes(), ", expected [", N, "], one entry per output feature");
  TORCH_CHECK_TYPE(vector->scalar_type() == dtype, op, ": ", name, ": got dtype ",
                   dtype_name(vector->scalar_type()), ", expected ", dtype_name(dtype),
                   "; convert it with .to()");
}

// A vector that kernels read in their compute type, so of any floating dtype.
inline void check_factor(const char* op, const char* name, const OptionalTensor& vector,
                         const Tensor& x, const c10::SymInt& N) {
  if (!vector.has_value()) return;
  TORCH_CHECK_TYPE(is_lora_base_dtype(vector->scalar_type()), op, ": ", name, ": got dtype ",
                   dtype_name(vector->scalar_type()),
                   ", expected a floating-point one; convert with .to()");
  check_vector(op, name, vector, x, N, vector->scalar_type());
}

inline void check_adapters(const char* op, const char* name, const Tensor& x, const c10::SymInt& N,
                           const c10::SymInt& K, const Tensor& lora_A, const Tensor& lora_B) {
  const auto base = x.scalar_type();
  check_dense(op, name, x);
  check_base_dtype(op, name, x);
  check_device(op, "lora_A", lora_A, x);
  check_device(op, "lora_B", lora_B, x);
  TORCH_CHECK_VALUE(lora_A.dim() == 2 && lora_A.sym_size(1) == K, op, ": lora_A: got shape ",
                    lora_A.sym_sizes(), ", expected [r, ", K, "], [rank, in_features]");
  TORCH_CHECK_VALUE(
      lora_B.dim() == 2 && lora_B.sym_size(0) == N && lora_B.sym_size(1) == lora_A.sym_size(0), op,
      ": lora_B: got shape ", lora_B.sym_sizes(), ", expected [", N, ", ", lora_A.sym_size(0),
      "], [out_features, rank]");
  TORCH_CHECK_TYPE(is_adapter_dtype(lora_A.scalar_type(), base), op, ": lora_A: got dtype ",
                   dtype_name(lora_A.scalar_type()), " on a ", dtype_name(base), " base, expected ",
                   dtype_name(base),
                   " (or float32 on a bfloat16 or float16 base); convert it with .to()");
  TORCH_CHECK_TYPE(lora_B.scalar_type() == lora_A.scalar_type(), op, ": lora_B: got dtype ",
                   dtype_name(lora_B.scalar_type()), ", expected lora_A's ",
                   dtype_name(lora_A.scalar_type()));
}

inline void check_dropout_p(const char* op, double dropout_p) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p: got ", dropout_p,
                    ", expected a probability from 0 to 1");
}

inline void check_rng_state(const char* op, const Tensor& state) {
  TORCH_CHECK_VALUE(state.scalar_type() == at::kLong && state.dim() == 1 && state.sym_size(0) == 2,
                    op, ": rng_state: got ", dtype_name(state.scalar_type()), " of shape ",
                    state.sym_sizes(), ", expected an int64 tensor [2] from draw_rng_state(x)");
}

}  // namespace lora_ext
