// Small matrix products on operands that lie in cache. The accumulators are registers of the
// compute type S; the second operand is read in its storage type TB and widened on load, so a bf16
// adapter is never copied.
//
//   gemm_nn   C[i][j] (+)= sum_k A(i,k) B[k][j]     vector along j; A(i,k) = a[i*a_row + k*a_col]
//   gemm_nt   C[i][j] (+)= sum_k A[i][k] B[j][k]    vector along k
//
// A product is summed from zero and then added to C, so that cutting k into blocks also cuts the
// rounding error of long sums.
#pragma once

#include "vec.h"

namespace lora_ext::LORA_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
constexpr int kAccumulators = kVectorRegisters * 3 / 4;  // the rest hold operands
constexpr int kMaxTileVectors = kVectorRegisters / 8;

template <class S, class TB, int kRows, int kVectors, bool kPartial>
inline void nn_tile(int64_t K, const S* a, int64_t a_row, int64_t a_col, const TB* b,
                    int64_t ldb,        // [K, kVectors * width]
                    S* c, int64_t ldc,  // [kRows, kVectors * width]
                    bool accumulate, int lanes) {
  using V = Vec<S>;
  typename V::Reg acc[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = V::zero();
  }
  for (int64_t k = 0; k < K; ++k) {
    typename V::Reg operand[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const TB* p = b + k * ldb + v * V::kWidth;
      if constexpr (kPartial) {
        operand[v] = V::load_partial(p, lanes);
      } else {
        operand[v] = V::load(p);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const auto factor = V::set1(a[i * a_row + k * a_col]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::fma(factor, operand[v], acc[i][v]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      S* p = c + i * ldc + v * V::kWidth;
      if constexpr (kPartial) {
        if (accumulate) acc[i][v] = V::add(acc[i][v], V::load_partial(p, lanes));
        V::store_partial(p, acc[i][v], lanes);
      } else {
        if (accumulate) acc[i][v] = V::add(acc[i][v], V::load(p));
        V::store(p, acc[i][v]);
      }
    }
  }
}

template <class S, class TB, int kVectors, bool kPartial>
inline void nn_column(int64_t rows, int64_t K, const S* a, int64_t a_row, int64_t a_col,
                      const TB* b, int64_t ldb, S* c, int64_t ldc, bool accumulate, int lanes) {
  constexpr int kRows = kAccumulators / kVectors;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    nn_tile<S, TB, kRows, kVectors, kPartial>(K, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc,
                                              ldc, accumulate, lanes);
  }
  for (; i + 4 <= rows; i += 4) {
    nn_tile<S, TB, 4, kVectors, kPartial>(K, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc,
                                          accumulate, lanes);
  }
  for (; i < rows; ++i) {
    nn_tile<S, TB, 1, kVectors, kPartial>(K, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc,
                                          accumulate, lanes);
  }
}

template <class S, class TB>
void gemm_nn(int64_t rows, int64_t columns, int64_t K, const S* a, int64_t a_row, int64_t a_col,
             const TB* b, int64_t ldb, S* c, int64_t ldc, bool accumulate) {
  constexpr int kWidth = Vec<S>::kWidth;
  int64_t j = 0;
  for (; j + kMaxTileVectors * kWidth <= columns; j += kMaxTileVectors * kWidth) {
    nn_column<S, TB, kMaxTileVectors, false>(rows, K, a, a_row, a_col, b + j, ldb, c + j, ldc,
                                             accumulate, kWidth);
  }
  if constexpr (kMaxTileVectors > 2) {
    for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
      nn_column<S, TB, 2, false>(rows, K, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate,
                                 kWidth);
    }
  }
  for (; j + kWidth <= columns; j += kWidth) {
    nn_column<S, TB, 1, false>(rows, K, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate,
                               kWidth);
  }
  if (j < columns) {
    nn_column<S, TB, 1, true>(rows, K, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate,
                              static_cast<int>(columns - j));
  }
}

template <class S, class TB, int kRows, int kColumns>
inline void nt_tile(int64_t K, const S* a, int64_t lda,  // [kRows, K]
                    const TB* b, int64_t ldb,            // [kColumns, K]
                    S* c, int64_t ldc, bool accumulate) {
  using V = Vec<S>;
  typename V::Reg acc[kRows][kColumns];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) acc[i][j] = V::zero();
  }
  const auto step = [&](auto&& load, int64_t k) {
    typename V::Reg operand[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) operand[j] = load(b + j * ldb + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const auto factor = load(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) acc[i][j] = V::fma(factor, operand[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + V::kWidth <= K; k += V::kWidth) step([](auto* p) { return V::load(p); }, k);
  if (k < K) {
    const int lanes = static_cast<int>(K - k);
    step([lanes](auto* p) { return V::load_partial(p, lanes); }, k);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      S* p = c + i * ldc + j;
      *p = V::sum(acc[i][j]) + (accumulate ? *p : S{0});
    }
  }
}

template <class S, class TB>
void gemm_nt(int64_t rows, int64_t columns, int64_t K, const S* a, int64_t lda, const TB* b,
             int64_t ldb, S* c, int64_t ldc, bool accumulate) {
  constexpr int kRows = 4;
  constexpr int kColumns = kMaxTileVectors;
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      nt_tile<S, TB, kRows, kColumns>(K, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc,
                                      accumulate);
    }
    for (; i < rows; ++i) {
      nt_tile<S, TB, 1, kColumns>(K, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc,
                                  accumulate);
    }
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      nt_tile<S, TB, 1, 1>(K, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc, accumulate);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
