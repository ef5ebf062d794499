// The vector kernel of merge_. Leading dimensions are in elements.
#pragma once

#include <cstdint>

namespace lora_ext {

struct MergeKernels {
  int64_t (*scratch_bytes)(int64_t r);  // that one call of rows needs
  // Rows [begin, end) of weight [N, K] = weight * factor + scaling * B A, the factor in the compute
  // type being row_factor [N] or column_factor [K] or, both null, 1. Returns whether every result
  // is finite; `store` false only looks.
  bool (*rows)(void* weight, int64_t ldw, const void* row_factor, const void* column_factor,
               const void* lora_A, const void* lora_B, int64_t K, int64_t r, double scaling,
               int64_t begin, int64_t end, bool store, void* scratch);
};

}  // namespace lora_ext
