// The small kernels: sums of parts, adapters prepared for tensor cores, dropout's mask, merging.
// One thread an element, any architecture.
#pragma once

#include "arch/arch.h"
#include "lora_linear.h"

namespace lora_ext {

constexpr int kElementThreads = 256;

LORA_EXT_DEVICE int64_t element_index() {
  return int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
}

constexpr int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }

template <class Params>
void launch_elements(void (*kernel)(Params), int64_t elements, Stream stream,
                     const Params& params) {
  const auto blocks = static_cast<unsigned>(ceil_div(elements, kElementThreads));
  arch::launch(kernel, dim3(blocks), kElementThreads, 0, stream, params);
}

// A number of the call, times one that only the device knows, so that nobody waits for it.
struct Scale {
  float value;
  const float* factor;  // or null

  LORA_EXT_DEVICE float get() const { return factor ? value * *factor : value; }
};

template <class T>
struct ReduceParams {
  const float* parts;  // [count, elements]
  int64_t count, elements;
  Scale scale;
  T* out;  // [elements]: scale * sum over the parts, in their order
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    reduce_kernel(const __grid_constant__ ReduceParams<T> params) {
  const int64_t i = element_index();
  if (i >= params.elements) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < params.count; ++p) sum += params.parts[p * params.elements + i];
  params.out[i] = rounded<T>(params.scale.get() * sum);
}

// An adapter in the 16-bit type of the base, filled up with zero rows and columns so that 16-byte
// copies may read it; of a float adapter also what that rounding leaves.
template <class T, class TA>
struct PackParams {
  const TA* in;  // [in_rows, in_columns]
  int64_t in_rows, in_columns;
  int64_t rows, columns;
  T* value;      // [rows, columns]
  T* remainder;  // [rows, columns] or null
};

template <class T, class TA>
__global__ void __launch_bounds__(kElementThreads)
    pack_kernel(const __grid_constant__ PackParams<T, TA> params) {
  const int64_t i = element_index();
  if (i >= params.rows * params.columns) return;
  const int64_t row = i / params.columns, column = i % params.columns;
  const bool inside = row < params.in_rows && column < params.in_columns;
  const float full = inside ? to_float(params.in[row * params.in_columns + column]) : 0.0f;
  const T value = rounded<T>(full);
  params.value[i] = value;
  if (params.remainder) {
    const float left = full - to_float(value);
    params.remainder[i] = rounded<T>(left == left ? left : 0.0f);  // of infinity nothing is left
  }
}

// Summed in float and rounded once.
template <class T, class TA>
__global__ void __launch_bounds__(kElementThreads)
    merge_kernel(const __grid_constant__ MergeCall<T, TA> params) {
  const int64_t i = element_index();
  if (i >= params.N * params.K) return;
  const int64_t n = i / params.K, k = i % params.K;
  float sum = 0.0f;
  for (int j = 0; j < params.rank; ++j) {
    sum += params.scaling * to_float(params.lora_B[n * params.rank + j]) *
           to_float(params.lora_A[j * params.K + k]);
  }
  T* weight = params.weight + n * params.stride + k;
  const T result = rounded<T>(to_float(*weight) + sum);
  const float back = to_float(result);
  if (back - back != 0.0f) *params.finite = 0;  // every thread that gets here writes the same
  if (params.write) *weight = result;
}

}  // namespace lora_ext
