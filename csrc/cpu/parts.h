// A part is a range of rows that one thread works on. Into how many parts rows are cut.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lora_ext {

// Ranges of rows for so many threads, each with sums of its own over its rows. Sums of very many
// rows are made of several, so that none adds up too many in sequence.
inline int64_t parts_for_sums(int64_t M, int64_t threads) {
  constexpr int64_t kMaxRows = 1024;
  const int64_t parts = std::max<int64_t>(1, threads), rows = parts * kMaxRows;
  return parts * std::max<int64_t>(1, (M + rows - 1) / rows);
}

}  // namespace lora_ext
