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
  const float* parts;  // [count, elements]
  int64_t count, elements;
  HiddenFactor scale;
  T* out;  // [elements]: scale * sum over the parts, in their order
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_reduce_kernel(const __grid_constant__ ReduceParams<T> params) {
  const int64_t i = element_index();
  if (i >= params.elements) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < params.count; ++p) sum += params.parts[p * params.elements + i];
  params.out[i] = rounded<T>(params.scale.get() * sum);
}

// h or dh from its parts.
template <class T>
struct FinishParams {
  const float* parts;  // [count, M, r]
  int count;
  int64_t M;
  int r, padded;   // padded: r rounded up to a multiple of 16
  int copies;      // of the result, beside each other
  float survivor;  // dropout's 1 / (1 - p)
  HiddenFactor scaling;
  float* sums;   // [M, r]: survivor * sum over the parts; or null
  T* value;      // [M, copies * padded]: scaling * sums rounded, zero beyond r
  T* remainder;  // the same: what that rounding left; or null
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_finish_kernel(const __grid_constant__ FinishParams<T> params) {
  const int64_t i = element_index();
  const int64_t row = i / params.padded;
  const int column = static_cast<int>(i % params.padded);
  if (row >= params.M) return;
  float sum = 0.0f;
  if (column < params.r) {
    for (int p = 0; p < params.count; ++p) {
      sum += params.parts[(p * params.M + row) * params.r + column];
    }
    sum *= params.survivor;
    if (params.sums) params.sums[row * params.r + column] = sum;
  }
  const float full = params.scaling.get() * sum;
  for (int64_t copy = 0; copy < params.copies; ++copy) {
    const int64_t at = (row * params.copies + copy) * params.padded + column;
    store_split(full, params.value, params.remainder, at);
  }
}

// A matrix as a Split, filled up with zeros: columns, so that 16-byte copies may read it, and rows.
template <class T, class TA>
struct PackParams {
  const TA* in;  // [rows, columns], their elements `row_step` and `column_step` apart
  int64_t rows, columns, row_step, column_step;
  int64_t padded_rows, padded_columns, stride;  // of the result
  T* value;
  T* remainder;  // laid out like value; or null
};

template <class T, class TA>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_pack_kernel(const __grid_constant__ PackParams<T, TA> params) {
  const int64_t i = element_index();
  const int64_t row = i / params.padded_columns, column = i % params.padded_columns;
  if (row >= params.padded_rows) return;
  const bool inside = row < params.rows && column < params.columns;
  const int64_t at = row * params.row_step + column * params.column_step;
  const float full = inside ? to_float(params.in[at]) : 0.0f;
  store_split(full, params.value, params.remainder, row * params.stride + column);
}

}  // namespace lora_ext
