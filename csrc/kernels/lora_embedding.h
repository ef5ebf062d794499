// lora_embedding by kernels for any GPU: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "element.h"
#include "lora_linear.h"
#include "stream.h"

namespace lora_ext {

// y = weight[tokens] + scaling * lora_A^T[tokens] lora_B^T, rounded once.
template <class T, class TA>
struct EmbeddingCall {
  const int64_t* tokens;  // [M]
  int64_t M;
  Matrix<T> weight;  // [V, D]
  const TA* lora_A;  // [rank, V]
  const TA* lora_B;  // [D, rank]
  int rank;
  float scaling;
  T* y;  // [M, D]
};
// A token that is none ends all work of the program on the GPU, as in ATen's lookups.
template <class T, class TA>
void run_lora_embedding(const EmbeddingCall<T, TA>& call, Stream stream);

}  // namespace lora_ext
