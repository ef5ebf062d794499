// The vector kernels of lora_embedding. Leading dimensions are in elements.
#pragma once

#include <cstdint>

namespace lora_ext {

struct LoraEmbeddingForwardArgs {
  int64_t V, D, r;
  const int64_t* tokens;  // [M], each in [0, V)
  const void* weight;     // [V, D] base type, rows ldw apart
  int64_t ldw;
  const void* lora_A;    // [r, V] adapter type
  const void* lora_B_t;  // [D, r] adapter type, packed
  double scaling;
  void* y;  // [M, D] base type, written
};

struct LoraEmbeddingBackwardArgs {
  int64_t V, D, r;
  const int64_t* tokens;  // [M], each in [0, V)
  const void* dy;         // [M, D] base type, rows lddy apart
  int64_t lddy;
  const void* lora_A;  // [r, V] adapter type
  const void* lora_B;  // [D, r] adapter type
  double scaling;
  void* dh;  // [M, r] compute type, written, or null
};

struct LoraEmbeddingKernels {
  // Bytes of scratch that one call of forward_rows or backward_rows needs.
  int64_t (*scratch_bytes)(int64_t r);
  // Rows [begin, end) of y = weight[tokens] + scaling * h B^T, with h = A^T[tokens].
  void (*forward_rows)(const LoraEmbeddingForwardArgs&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of dh = scaling * dy B; the sum over these rows h^T dy (not scaled) to
  // dB [r, D], in the compute type, or null.
  void (*backward_rows)(const LoraEmbeddingBackwardArgs&, int64_t begin, int64_t end, void* dB,
                        void* scratch);
};

}  // namespace lora_ext
