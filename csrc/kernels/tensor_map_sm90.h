// Matrices as TMA reads them. Host code without torch.
#pragma once

#include "arch/arch.h"
#include "family.h"

namespace lora_ext::sm90 {

// Whether rows and columns can be counted in 32 bits.
template <class T>
bool small(const Matrix<T>& matrix) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  return matrix.rows <= kMost && matrix.columns <= kMost;
}

template <class T>
arch::TensorMap tensor_map(const Matrix<T>& matrix, int box_rows, int box_columns,
                           arch::Swizzle swizzle) {
  arch::TensorMap map;
  const int error = arch::encode_tensor_map(map, matrix.data, matrix.rows, matrix.columns,
                                            matrix.stride, box_rows, box_columns, swizzle);
  if (error != 0) {
    throw std::runtime_error("lora_ext: the CUDA driver made no tensor map: error " +
                             std::to_string(error));
  }
  return map;
}

}  // namespace lora_ext::sm90
