// Sums of squares of W + scaling * B A, whose elements exist in registers only.
#pragma once

#include "float_math.h"
#include "merge_rows.h"

namespace lora_ext::LORA_EXT_ISA {

// sums[i] (kWidth lanes each) or, by column, sums[j] += (weight[i][j] + result)^2
template <class S, class T>
struct SumSquares {
  const T* weight;
  int64_t stride;
  bool by_column;
  S* sums;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    using V = Vec<S>;
    const auto value = V::add(load_lanes<S>(weight + i * stride + j, lanes), result);
    if (by_column) {
      store_lanes<S>(sums + j, V::fma(value, value, load_lanes<S>(sums + j, lanes)), lanes);
    } else {
      S* sum = sums + i * V::kWidth;
      V::store(sum, V::fma(value, value, V::load(sum)));  // unused lanes of value are 0
    }
  }
};

constexpr int64_t kNormColumns = 1024;  // of a chunk: as much of lora_A stays in cache

template <class S>
int64_t weight_norm_bytes(int64_t r) {
  const int64_t sums = kMergeRows * Vec<S>::kWidth;
  return (kMergeRows * r + (sums > kNormColumns ? sums : kNormColumns)) *
         static_cast<int64_t>(sizeof(S));
}

// Adds the squares of rows [begin, end) of weight [N, K] + scaling * B A to sums [N], or by column
// to sums [K].
template <class T, class TA>
void weight_norm_rows(const void* weight, int64_t ldw, const void* lora_A, const void* lora_B,
                      int64_t K, int64_t r, double scaling, int64_t begin, int64_t end,
                      bool by_column, void* sums, void* scratch) {
  using S = compute_t<T>;
  using V = Vec<S>;
  auto* totals = static_cast<S*>(sums);
  auto* scaled = static_cast<S*>(scratch);
  S* sums_of_chunk = scaled + kMergeRows * r;  // of one chunk, so that no sum has too many terms
  for (int64_t n = begin; n < end; n += kMergeRows) {
    const int64_t rows = at_most(end - n, kMergeRows);
    copy_kept(static_cast<const TA*>(lora_B) + n * r, r, rows, r, nullptr, 0, scaled, r);
    for (int64_t i = 0; i < rows * r; ++i) scaled[i] *= static_cast<S>(scaling);
    for (int64_t k = 0; k < K; k += kNormColumns) {
      const int64_t columns = at_most(K - k, kNormColumns);
      const int64_t count = by_column ? columns : rows * V::kWidth;
      for (int64_t i = 0; i < count; ++i) sums_of_chunk[i] = 0;
      gemm(rows, columns, r, LeftRows<S>{scaled, r, 1},
           RightRows<TA>{static_cast<const TA*>(lora_A) + k, K},
           SumSquares<S, T>{static_cast<const T*>(weight) + n * ldw + k, ldw, by_column,
                            sums_of_chunk});
      if (by_column) {
        for (int64_t j = 0; j < columns; ++j) totals[k + j] += sums_of_chunk[j];
      } else {
        for (int64_t i = 0; i < rows; ++i)
          totals[n + i] += V::sum(V::load(sums_of_chunk + i * V::kWidth));
      }
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
