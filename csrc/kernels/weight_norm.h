// weight_norm by kernels for any GPU: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "element.h"
#include "lora_linear.h"
#include "stream.h"

namespace lora_ext {

// norms = the norm of each row of weight + scaling * B A, or of each column.
template <class T, class TA>
struct WeightNormCall {
  Matrix<T> weight;  // [N, K]
  const TA* lora_A;  // [rank, K]
  const TA* lora_B;  // [N, rank]
  int rank;
  float scaling;
  bool by_column;
  float* norms;  // [N], or by column [K]
};
template <class T, class TA>
void run_weight_norm(const WeightNormCall<T, TA>& call, const Allocator& scratch, Stream stream);

}  // namespace lora_ext
