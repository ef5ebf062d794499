// column_scale and its gradients by kernels for any GPU: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "element.h"
#include "lora_linear.h"
#include "stream.h"

namespace lora_ext {

// y = z * scale + bias, rounded once.
template <class T>
struct ColumnScaleCall {
  Matrix<T> z;         // [M, N]
  const float* scale;  // [N], 16-byte aligned
  const float* bias;   // the same, or null
  T* y;                // [M, N]
};
template <class T>
void run_column_scale(const ColumnScaleCall<T>& call, Stream stream);

// dz = dy * scale; dscale and dbias are the sums over the rows of dy * z and of dy.
template <class T>
struct ColumnScaleBackwardCall {
  Matrix<T> dy;        // [M, N]
  Matrix<T> z;         // [M, N]; data null if dscale is not wanted
  const float* scale;  // [N], 16-byte aligned
  T* dz;               // [M, N] or null
  float* dscale;       // [N] or null
  float* dbias;        // [N] or null
};
template <class T>
void run_column_scale_backward(const ColumnScaleBackwardCall<T>& call, const Allocator& scratch,
                               Stream stream);

}  // namespace lora_ext
