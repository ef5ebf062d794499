// Facts about tensors that operators ask for in one way.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext {

// Rows of a tensor [..., width]: the product of the leading sizes, right also where width is 0.
inline c10::SymInt count_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows = rows * size;
  return rows;
}

// [..., width] as [rows, width], differentiable.
inline at::Tensor flattened(const at::Tensor& tensor) {
  return tensor.reshape_symint({count_rows(tensor), tensor.sym_size(-1)});
}

}  // namespace lora_ext
