// How the CPU backend runs dora_linear, from facts alone; and in which chunks of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/dropout.h"

namespace lora_ext {

// How dora_linear makes the product of W with the kept elements of x, and its gradient.
struct DoraLinearPath {
  bool skips;  // the product with all of x less one with the dropped elements; or a dense product
  const char* reason;
};

// Places in the lists of a chunk of rows, one for each element at most, are int32.
constexpr int64_t kMaxDropped = std::numeric_limits<int32_t>::max();

inline DoraLinearPath choose_dora_linear_path(int64_t M, int64_t K, double dropout_p, bool bf16,
                                              bool fast_blas) {
  // W is transposed panel by panel in every call, which fewer rows do not pay for.
  constexpr int64_t kMinRows = 64;
  // Lists of dropped elements are multiplied at less than the rate of BLAS, half as fast in float32
  // and a quarter in bf16: measured on AVX-512. Where BLAS is slow they pay longer, but the
  // difference of two products loses 1 / (1 - p) of what x W^T was rounded to.
  const double max_dropout_p = fast_blas && bf16 ? 0.25 : 0.5;
  if (K == 0) return {false, "there is nothing to drop"};
  if (K > kMaxDropped - kDropoutBlock) return {false, "a row is too long for lists"};
  if (M < kMinRows) return {false, "few rows do not pay for packing the weight"};
  if (dropout_p > max_dropout_p) {
    return {false, fast_blas ? "so many elements are dropped that BLAS is faster"
                             : "so many elements are dropped that their product would lose digits"};
  }
  return {true, "its second base product is one with the dropped elements alone"};
}

// Rows are cut into chunks, so that sums of a chunk stay in the L2 cache; smaller ones where there
// would be too few tasks, chunks times `parts`, for the threads, or too many places in a list.
inline int64_t rows_per_chunk(int64_t M, int64_t K, int64_t parts, int64_t threads) {
  constexpr int64_t kMaxRows = 1024, kMinRows = 128, kTasksPerThread = 4;
  const auto divup = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t chunks = divup(kTasksPerThread * threads, parts);
  const int64_t rows = std::clamp(divup(M, chunks), kMinRows, kMaxRows);
  return std::min(rows, kMaxDropped / (divup(K, kDropoutBlock) * kDropoutBlock));
}

}  // namespace lora_ext
