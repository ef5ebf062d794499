// The small kernels between the passes of lora_linear: sums of parts, and adapters prepared for
// tensor cores.
#pragma once

#include "elementwise.h"
#include "lora_linear_passes.h"

namespace lora_ext {

// Element i of a Split, whose remainder may be null.
template <class T>
LORA_EXT_DEVICE void store_split(float full, T* value, T* remainder, int64_t i) {
  const T near = rounded<T>(full);
  value[i] = near;
  if (remainder) {
    const float left = full - to_float(near);
    remainder[i] = rounded<T>(left == left ? left : 0.0f);  // of infinity nothing is left
  }
}

template <class T>
struct ReduceParams {
  const float* parts;  // [count, elements], step apart
  int64_t count, step, elements;
  HiddenFactor scale;
  T* out;  // [elements]: scale * sum over the parts, in their order

  LORA_EXT_DEVICE void run(int64_t i) const {
    if (i >= elements) return;
    float sum = 0.0f;
    for (int64_t p = 0; p < count; ++p) sum += parts[p * step + i];
    out[i] = rounded<T>(scale.get() * sum);
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_reduce_kernel(const __grid_constant__ ReduceParams<T> params) {
  params.run(element_index());
}

// h or dh from its parts.
template <class T>
struct FinishParams {
  const float* parts;  // [count, M, r], rows parts_stride apart
  int count;
  int64_t M, parts_stride;
  int r, padded;   // padded: r rounded up to a multiple of 16
  int copies;      // of the result, beside each other
  int64_t stride;  // of the result's rows
  float survivor;  // dropout's 1 / (1 - p)
  HiddenFactor scaling;
  float* sums;   // [M, r]: survivor * sum over the parts; or null
  T* value;      // [M, copies * padded]: scaling * sums rounded, zero beyond r
  T* remainder;  // the same: what that rounding left; or null

  LORA_EXT_DEVICE void run(int64_t i) const {
    const int64_t row = i / padded;
    const int column = static_cast<int>(i % padded);
    if (row >= M) return;
    float sum = 0.0f;
    if (column < r) {
      for (int p = 0; p < count; ++p) sum += parts[(p * M + row) * parts_stride + column];
      sum *= survivor;
      if (sums) sums[row * r + column] = sum;
    }
    const float full = scaling.get() * sum;
    for (int64_t copy = 0; copy < copies; ++copy) {
      store_split(full, value, remainder, row * stride + copy * padded + column);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_finish_kernel(const __grid_constant__ FinishParams<T> params) {
  params.run(element_index());
}

// A matrix as a Split, filled up with zeros: columns, so that 16-byte copies may read it, and rows.
template <class T, class TA>
struct PackParams {
  const TA* in;  // [rows, columns], their elements `row_step` and `column_step` apart
  int64_t rows, columns, row_step, column_step;
  int64_t padded_rows, padded_columns, stride;  // of the result
  T* value;
  T* remainder;  // laid out like value; or null

  LORA_EXT_DEVICE void run(int64_t i) const {
    const int64_t row = i / padded_columns, column = i % padded_columns;
    if (row >= padded_rows) return;
    const bool inside = row < rows && column < columns;
    const float full = inside ? to_float(in[row * row_step + column * column_step]) : 0.0f;
    store_split(full, value, remainder, row * stride + column);
  }
  int64_t elements() const { return padded_rows * padded_columns; }
  Split<T> result() const { return {{value, rows, columns, stride}, remainder}; }
};

template <class T, class TA>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_pack_kernel(const __grid_constant__ PackParams<T, TA> params) {
  params.run(element_index());
}

}  // namespace lora_ext
