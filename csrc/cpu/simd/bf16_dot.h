// Matrix products of bf16 operands that lie in cache, on the AVX512_BF16 dot product, which
// multiplies pairs of neighbouring terms exactly and sums them in float. Denormal terms count as
// zero.
//
//   C[i][j] = sum_k A(i,k) B(k,j)     vector along j, two terms k at a time
//
// An operand is read in the order in which it lies: Words says where the pair (2p, 2p + 1) of row i
// of A is, RowPairs and PackedPairs where it is of 16 columns of B.
#pragma once

#include <immintrin.h>

#include "prefetch.h"
#include "types.h"

namespace lora_ext::LORA_EXT_ISA {

inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xFFFFu : (1u << n) - 1u);
}

// Each pair of terms is one 32-bit word. A float operand is given as its bf16 and, remainder_bytes
// further on, the bf16 of what that leaves; the remainder of the first `exact` pairs is read.
struct Words {
  const char* data;
  int64_t row_bytes, pair_bytes;
  int64_t remainder_bytes = 0, exact = 0;
  bool cold = false;  // rows come from memory: those of the next tile are prefetched while one runs

  Words from(int64_t k) const {
    Words result = *this;
    result.data += k / 2 * pair_bytes;
    return result;
  }
  const char* at(int64_t i, int64_t pair, bool remainder = false) const {
    return data + i * row_bytes + pair * pair_bytes + (remainder ? remainder_bytes : 0);
  }
  __m512bh pair(int64_t i, int64_t pair, bool remainder = false) const {
    int32_t word;
    std::memcpy(&word, at(i, pair, remainder), sizeof(word));
    return (__m512bh)_mm512_set1_epi32(word);
  }
  // The last term of an odd number: what lies after it is not read.
  __m512bh single(int64_t i, int64_t pair, bool remainder = false) const {
    uint16_t bits;
    std::memcpy(&bits, at(i, pair, remainder), sizeof(bits));
    return (__m512bh)_mm512_set1_epi32(bits);
  }
};

// Rows k of a bf16 matrix, joined to pairs on the way.
struct RowPairs {
  const BFloat16* data;
  int64_t stride;
  bool cold = false;  // as above, for the next columns

  RowPairs from(int64_t k) const { return {data + k * stride, stride, cold}; }
  __m512bh pair(int64_t pair, int64_t column, __mmask16 lanes) const {
    const BFloat16* p = data + 2 * pair * stride + column;
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i first = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, p));
    const __m512i both = _mm512_inserti64x4(first, _mm256_maskz_loadu_epi16(lanes, p + stride), 1);
    return (__m512bh)_mm512_permutexvar_epi16(order, both);
  }
  __m512bh single(int64_t pair, int64_t column, __mmask16 lanes) const {
    const BFloat16* p = data + 2 * pair * stride + column;
    return (__m512bh)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  }
  [[gnu::always_inline]] void call(int64_t pair, int64_t column) const {
    if (!cold) return;
    prefetch(data + 2 * pair * stride + column);
    prefetch(data + (2 * pair + 1) * stride + column);
  }
};

// Rows of pairs that pack_pairs() has made; the last one is filled up with zero.
struct PackedPairs {
  const uint32_t* data;
  int64_t stride;

  PackedPairs from(int64_t k) const { return {data + k / 2 * stride, stride}; }
  __m512bh pair(int64_t pair, int64_t column, __mmask16 lanes) const {
    return (__m512bh)_mm512_maskz_loadu_epi32(lanes, data + pair * stride + column);
  }
  __m512bh single(int64_t p, int64_t column, __mmask16 lanes) const {
    return pair(p, column, lanes);
  }
  void call(int64_t, int64_t) const {}
};

template <int kRows, int kVectors, class B, class Store>
inline void dot_tile(int64_t row, int64_t column, int64_t K, const Words& a, const B& b, int lanes,
                     const Store& store) {
  const __mmask16 mask = first_lanes(lanes);
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_setzero_ps();
  }
  __m512bh operand[kVectors];
  const auto load = [&](int64_t p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) operand[v] = b.pair(p, column + 16 * v, mask);
  };
  const auto multiply = [&](auto&& factor_of) {
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const __m512bh factor = factor_of(row + i);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = _mm512_dpbf16_ps(acc[i][v], factor, operand[v]);
      }
    }
  };

  const auto call_next = [&](int64_t p) __attribute__((always_inline)) {
    constexpr int kPairsPerLine = kCacheLine / 4;
    if (a.cold && column == 0 && p % kPairsPerLine == 0) {
#pragma GCC unroll 32
      for (int i = 0; i < kRows; ++i) prefetch(a.at(row + kRows + i, p));
    }
    if (row == 0) b.call(p, column + 16 * kVectors);
  };

  const int64_t pairs = K / 2;
  int64_t p = 0;
  for (; p < a.exact && p < pairs; ++p) {
    load(p);
    call_next(p);
    multiply([&](int64_t i) { return a.pair(i, p); });
    multiply([&](int64_t i) { return a.pair(i, p, true); });
  }
  for (; p < pairs; ++p) {
    load(p);
    call_next(p);
    multiply([&](int64_t i) { return a.pair(i, p); });
  }
  if (K % 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) operand[v] = b.single(p, column + 16 * v, mask);
    multiply([&](int64_t i) { return a.single(i, p); });
    if (a.exact > pairs) multiply([&](int64_t i) { return a.single(i, p, true); });
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(row + i, column + 16 * v, acc[i][v], lanes);
  }
}

template <int kRows, class B, class Store>
inline void dot_row_tile(int64_t row, int64_t columns, int64_t K, const Words& a, const B& b,
                         const Store& store) {
  int64_t j = 0;
  if constexpr (kRows <= 12) {
    for (; j + 32 <= columns; j += 32) dot_tile<kRows, 2>(row, j, K, a, b, 16, store);
  }
  for (; j + 16 <= columns; j += 16) dot_tile<kRows, 1>(row, j, K, a, b, 16, store);
  if (j < columns) {
    dot_tile<kRows, 1>(row, j, K, a, b, static_cast<int>(columns - j), store);
  }
}

// store(i, j, sums, lanes) receives C[i][j .. j + lanes).
template <class B, class Store>
inline void dot_gemm(int64_t rows, int64_t columns, int64_t K, const Words& a, const B& b,
                     const Store& store) {
  int64_t i = 0;
  if (columns < 32) {  // one vector wide: more rows keep as many sums going
    for (; i + 24 <= rows; i += 24) dot_row_tile<24>(i, columns, K, a, b, store);
  }
  // 16 rows, the usual rank, are two equal tiles rather than 12 and 4.
  for (; i + 12 <= rows && rows != 16; i += 12) dot_row_tile<12>(i, columns, K, a, b, store);
  for (; i + 8 <= rows; i += 8) dot_row_tile<8>(i, columns, K, a, b, store);
  for (; i + 4 <= rows; i += 4) dot_row_tile<4>(i, columns, K, a, b, store);
  for (; i < rows; ++i) dot_row_tile<1>(i, columns, K, a, b, store);
}

}  // namespace lora_ext::LORA_EXT_ISA
