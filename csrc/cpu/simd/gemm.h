// Matrix products of operands that lie in cache, summed in registers of the compute type S.
//
//   C[i][j] = sum_k A(i,k) B[k][j]     vector along j
//
// B is widened on load from its storage type, so a 16-bit operand is never copied. What becomes of
// C is the caller's: store(i, j, sums, lanes) receives C[i][j .. j + lanes).
#pragma once

#include "vec.h"

namespace lora_ext::LORA_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kTileSums = 24;  // of 32 registers; the others hold operands
#else
constexpr int kTileSums = 12;  // of 16
#endif

template <class S>
struct LeftRows {
  const S* data;
  int64_t row, column;  // steps between neighbouring rows and columns

  LeftRows from(int64_t k) const { return {data + k * column, row, column}; }
  const S* at(int64_t i, int64_t k) const { return data + i * row + k * column; }
};

template <class T>
struct RightRows {
  const T* data;
  int64_t stride;

  RightRows from(int64_t k) const { return {data + k * stride, stride}; }
  const T* at(int64_t k, int64_t j) const { return data + k * stride + j; }
};

// kDeals: the terms of a single row are dealt out to several sums. Shorter ones err less, and one
// would wait for itself; but which rows are single in their tile depends on where threads begin.
template <class S, class T, int kRows, int kVectors, bool kPartial, bool kDeals, class Store>
inline void tile(int64_t row, int64_t column, int64_t K, const LeftRows<S>& a,
                 const RightRows<T>& b, int lanes, const Store& store) {
  using V = Vec<S>;
  constexpr int kDealt = kDeals && kRows == 1 ? 4 : 1;
  typename V::Reg sums[kDealt][kRows][kVectors];
#pragma GCC unroll 4
  for (int d = 0; d < kDealt; ++d) {
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[d][i][v] = V::zero();
    }
  }
  const auto multiply = [&](int64_t k, auto& to) __attribute__((always_inline)) {
    typename V::Reg operand[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const T* p = b.at(k, column + v * V::kWidth);
      if constexpr (kPartial) {
        operand[v] = V::load_partial(p, lanes);
      } else {
        operand[v] = V::load(p);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const auto factor = V::set1(*a.at(row + i, k));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) to[i][v] = V::fma(factor, operand[v], to[i][v]);
    }
  };
  int64_t k = 0;
  for (; k + kDealt <= K; k += kDealt) {
#pragma GCC unroll 4
    for (int d = 0; d < kDealt; ++d) multiply(k + d, sums[d]);
  }
  if constexpr (kDealt == 4) {
    if (k < K) multiply(k, sums[0]);
    if (k + 1 < K) multiply(k + 1, sums[1]);
    if (k + 2 < K) multiply(k + 2, sums[2]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[0][0][v] =
          V::add(V::add(sums[0][0][v], sums[1][0][v]), V::add(sums[2][0][v], sums[3][0][v]));
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store(row + i, column + v * V::kWidth, sums[0][i][v], kPartial ? lanes : V::kWidth);
    }
  }
}

// Rows [row, row + kRows) of C.
template <class S, class T, int kRows, bool kDeals, class Store>
inline void row_tile(int64_t row, int64_t columns, int64_t K, const LeftRows<S>& a,
                     const RightRows<T>& b, const Store& store) {
  constexpr int kWidth = Vec<S>::kWidth;
  int64_t j = 0;
  if constexpr (kRows <= kTileSums / 2) {
    for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
      tile<S, T, kRows, 2, false, kDeals>(row, j, K, a, b, kWidth, store);
    }
  }
  for (; j + kWidth <= columns; j += kWidth) {
    tile<S, T, kRows, 1, false, kDeals>(row, j, K, a, b, kWidth, store);
  }
  if (j < columns) {
    tile<S, T, kRows, 1, true, kDeals>(row, j, K, a, b, static_cast<int>(columns - j), store);
  }
}

// sum_k a[k] b[k] in D
template <class D, class S, class T>
inline double dot_in(int64_t K, const S* a, const T* b) {
  using V = Vec<D>;
  constexpr int kSums = 4;
  typename V::Reg sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t k = 0;
  for (; k + kSums * V::kWidth <= K; k += kSums * V::kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      sums[i] = V::fma(V::load(a + k + i * V::kWidth), V::load(b + k + i * V::kWidth), sums[i]);
    }
  }
  for (; k < K; k += V::kWidth) {
    const int lanes = K - k < V::kWidth ? static_cast<int>(K - k) : V::kWidth;
    sums[0] = V::fma(V::load_partial(a + k, lanes), V::load_partial(b + k, lanes), sums[0]);
  }
  return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

template <bool kDeals = false, class S, class T, class Store>
void gemm(int64_t rows, int64_t columns, int64_t K, const LeftRows<S>& a, const RightRows<T>& b,
          const Store& store) {
  constexpr int kRows = kTileSums / 2;
  int64_t i = 0;
  if (columns < 2 * Vec<S>::kWidth) {  // one vector wide: more rows keep as many sums going
    for (; i + 2 * kRows <= rows; i += 2 * kRows) {
      row_tile<S, T, 2 * kRows, kDeals>(i, columns, K, a, b, store);
    }
  }
  // 16 rows, the usual rank, are two equal tiles rather than 12 and 4.
  for (; i + kRows <= rows && !(kRows == 12 && rows == 16); i += kRows) {
    row_tile<S, T, kRows, kDeals>(i, columns, K, a, b, store);
  }
  if constexpr (kRows > 8) {
    for (; i + 8 <= rows; i += 8) row_tile<S, T, 8, kDeals>(i, columns, K, a, b, store);
  }
  for (; i + 4 <= rows; i += 4) row_tile<S, T, 4, kDeals>(i, columns, K, a, b, store);
  for (; i < rows; ++i) row_tile<S, T, 1, kDeals>(i, columns, K, a, b, store);
}

}  // namespace lora_ext::LORA_EXT_ISA
