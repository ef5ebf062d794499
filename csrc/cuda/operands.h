// Tensors on CUDA as the kernels take them.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "kernels/lora_linear.h"
#include "kernels/scratch_blocks.h"
#include "ops/tensors.h"

namespace lora_ext {

// Scratch in torch's caching allocator, freed for later work of the same stream.
struct CudaScratch {
  at::TensorOptions options;
  std::vector<Tensor> blocks;
  ScratchBlocks cut;

  explicit CudaScratch(const at::TensorOptions& of) : options(of) {}

  static void* allocate(void* context, int64_t bytes) {
    auto* self = static_cast<CudaScratch*>(context);
    return self->cut.take(bytes, [self](int64_t block) {
      self->blocks.push_back(at::empty({block}, self->options.dtype(at::kByte)));
      return self->blocks.back().data_ptr();
    });
  }
  Allocator allocator() { return {allocate, this}; }
};

template <class T>
Matrix<T> matrix(const Tensor& rows) {
  return {static_cast<const T*>(rows.const_data_ptr()), rows.size(0), rows.size(1), rows.stride(0)};
}

// The same, or one without data of these sizes where there is no tensor.
template <class T>
Matrix<T> matrix(const Tensor& rows, int64_t count, int64_t columns) {
  return rows.defined() ? matrix<T>(rows) : Matrix<T>{nullptr, count, columns, columns};
}

// A vector that kernels read 16 bytes at a time: a copy where a view of it begins elsewhere.
inline Tensor aligned_vector(const OptionalTensor& vector, at::ScalarType dtype) {
  const Tensor found = as_vector(vector, dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(data_or_null(found)) % 16 == 0;
  return aligned ? found : found.clone();
}

// f(T{}) with the storage type of the base: for kernels of any GPU, so of all but double.
template <class F>
void with_base_type(at::ScalarType base, const F& f) {
  if (base == at::kBFloat16) return f(Bf16{});
  if (base == at::kHalf) return f(Fp16{});
  f(float{});
}

// f(T{}, TA{}) with that of the adapters too.
template <class F>
void with_all_types(at::ScalarType base, at::ScalarType adapter, const F& f) {
  with_base_type(base, [&](auto type) {
    if (adapter == at::kFloat) return f(type, float{});
    if constexpr (!std::is_same_v<decltype(type), float>) f(type, type);
  });
}

}  // namespace lora_ext
