// The vector kernel of weight_norm. Leading dimensions are in elements.
#pragma once

#include <cstdint>

namespace lora_ext {

struct WeightNormKernels {
  int64_t (*scratch_bytes)(int64_t r);  // that one call of rows needs
  // Adds the squares of rows [begin, end) of weight [N, K] + scaling * B A to sums [N], or
  // by_column to sums [K], in the compute type.
  void (*rows)(const void* weight, int64_t ldw, const void* lora_A, const void* lora_B, int64_t K,
               int64_t r, double scaling, int64_t begin, int64_t end, bool by_column, void* sums,
               void* scratch);
};

}  // namespace lora_ext
