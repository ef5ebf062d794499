// Facts about tensors that operators ask for in one way.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

namespace lora_ext {

// As Python has it: float32.
inline std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorVector = std::vector<Tensor>;

inline const OptionalTensor kNoTensor;

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Before it is checked that a tensor has dimensions.
inline c10::SymInt last_size(const Tensor& tensor) {
  return tensor.dim() > 0 ? tensor.sym_size(-1) : c10::SymInt(0);
}

// Rows of a tensor [..., width]: the product of the leading sizes, right also where width is 0.
inline c10::SymInt count_rows(const Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows = rows * size;
  return rows;
}

// The sizes of a tensor [..., width] with another width.
inline std::vector<c10::SymInt> with_width(const Tensor& tensor, const c10::SymInt& width) {
  auto sizes = tensor.sym_sizes().vec();
  sizes.back() = width;
  return sizes;
}

// [..., width] as [rows, width], differentiable.
inline Tensor flattened(const Tensor& tensor) {
  return tensor.reshape_symint({count_rows(tensor), tensor.sym_size(-1)});
}

// [..., width] as [rows, width] with neighbouring columns adjacent, for kernels and BLAS; copies
// only if it must.
inline Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = tensor.dim() == 2 ? tensor : flattened(tensor);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

// As a vector of adjacent elements of `dtype`; undefined if there is none.
inline Tensor as_vector(const OptionalTensor& vector, at::ScalarType dtype) {
  return vector.has_value() ? vector->to(dtype).contiguous() : Tensor();
}

// Where a gradient is to be written, with the dtype and device of `like`; [0] if it is not wanted.
inline Tensor gradient_or_empty(bool wanted, const Tensor& like, c10::SymIntArrayRef sizes) {
  const c10::SymInt none = 0;
  return at::empty_symint(wanted ? sizes : c10::SymIntArrayRef(none), like.options());
}
inline Tensor gradient_or_empty(bool wanted, const Tensor& like) {
  return gradient_or_empty(wanted, like, like.sym_sizes());
}

// Where the elements of a tensor are that may be undefined.
template <class T = void>
const T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <class T = void>
T* out_or_null(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

}  // namespace lora_ext
