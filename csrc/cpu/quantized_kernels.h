// The vector kernels of quantized matrices. Leading dimensions are in elements.
#pragma once

#include <cstdint>

#include "../quant/quantized_matrix.h"

namespace lora_ext {

// Part of a matrix: rows [row, row + rows) of its columns [column, column + columns).
struct QuantizedPart {
  int64_t row, rows, column, columns;
};

// Up to so many rows of x are multiplied without writing the matrix down.
constexpr int64_t kFewRows = 16;

struct FewRowsArgs {
  int64_t M;      // up to kFewRows
  const void* x;  // [M, K] base type, rows ldx apart
  int64_t ldx;
  void* packed;  // x as the kernel reads it
  void* y;       // [M, N] base type, rows ldy apart
  int64_t ldy;
  bool add;  // to what y holds
};

struct QuantizedKernels {
  // out [rows, columns], rows ld apart: the part's values, rounded to the base type; and those
  // widened to the compute type.
  void (*dequantize)(const QuantizedMatrix&, const QuantizedPart&, void* out, int64_t ld);
  void (*dequantize_wide)(const QuantizedMatrix&, const QuantizedPart&, void* out, int64_t ld);
  // Bytes of `packed`; writes it; columns [begin, end) of y = x W^T, or of y += that.
  int64_t (*few_rows_bytes)(const QuantizedMatrix&, int64_t M);
  void (*pack_few_rows)(const QuantizedMatrix&, const FewRowsArgs&);
  void (*few_rows)(const QuantizedMatrix&, const FewRowsArgs&, int64_t begin, int64_t end);
};

}  // namespace lora_ext
