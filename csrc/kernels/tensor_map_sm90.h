// Matrices as TMA reads them. Host code without torch.
#pragma once

#include "arch/arch.h"
#include "lora_linear_passes.h"

namespace lora_ext::sm90 {

template <class T>
arch::TensorMap tensor_map(const Matrix<T>& matrix, int box_rows, int box_columns,
                           arch::Swizzle swizzle) {
  // To the next row, which a single row does not have: but the driver checks it.
  const int64_t stride = matrix.rows == 1 ? (matrix.columns + 7) / 8 * 8 : matrix.stride;
  arch::TensorMap map;
  const int error = arch::encode_tensor_map(map, matrix.data, matrix.rows, matrix.columns, stride,
                                            box_rows, box_columns, swizzle);
  if (error != 0) {
    throw std::runtime_error("lora_ext: the CUDA driver made no tensor map: error " +
                             std::to_string(error));
  }
  return map;
}

}  // namespace lora_ext::sm90
