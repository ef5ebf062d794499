// Sums over what blocks made each of, for any GPU: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "stream.h"

namespace lora_ext {

// The sums that kernels share out among blocks: parts in their order, so without atomics.
struct SumParts {
  const float* parts;  // [count, results, columns]
  int64_t count, columns;
  float* out[2];  // [columns] each, or null: `results` of them
  int results;
  bool root;  // of each sum
};
void sum_parts(const SumParts& call, Stream stream);

}  // namespace lora_ext
