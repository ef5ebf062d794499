// The low-rank part of lora_linear, as a backend is asked for it. It is written into y and dx; the
// base product is added to it afterwards.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/lora_linear.h"

namespace lora_ext {

struct LowRankForward {
  Tensor x;       // [M, K], neighbouring columns adjacent
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  Tensor bias;    // [N] compute type: bias + scaling * lora_bias; or undefined
  LoraScale scale;
  Tensor y;  // [M, N], contiguous, written: scaling * dropout(x) A^T B^T + bias
  Tensor h;  // [M, r], contiguous, compute type, written: dropout(x) A^T; or undefined
};

struct LowRankBackward {
  Tensor dy;      // [M, N], neighbouring columns adjacent
  Tensor x;       // [M, K], neighbouring columns adjacent; or undefined
  Tensor h;       // [M, r], contiguous, compute type; or undefined
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  LoraScale scale;
  Tensor dx;  // [M, K], contiguous, written: dropout'(scaling * dy B A); or undefined
  Tensor dA;  // [r, K], contiguous, written; or undefined
  Tensor dB;  // [N, r], contiguous, written; or undefined
};

// Where the elements of a tensor are that may be undefined.
template <class T = void>
const T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <class T = void>
T* out_or_null(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

// BLAS calls, on any device and in any pair of dtypes; dropout on a copy of x that passes with the
// call. A scaling tensor stays on its device.
void low_rank_forward_blas(const LowRankForward& problem);
void low_rank_backward_blas(const LowRankBackward& problem);

}  // namespace lora_ext
