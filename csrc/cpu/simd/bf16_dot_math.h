// The arithmetic of lora_linear_rows.h on bf16 dot products, for bf16 base and adapters: neither is
// widened. h and dh are sums in float; where a product reads them again they are given as two bf16,
// value and remainder, except in dx, where they are rounded once.
#pragma once

#include "bf16_dot.h"
#include "rows.h"
#include "store.h"
#include "transpose.h"

namespace lora_ext::LORA_EXT_ISA {

inline __m256i round_bf16(__m512 a) { return (__m256i)_mm512_cvtneps_pbh(a); }

inline __m512 widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// What rounding to bf16 leaves of a; nothing of infinity.
inline __m256i round_remainder(__m512 a, __m256i rounded) {
  const __m512 remainder = _mm512_sub_ps(a, widen_bf16(rounded));
  return round_bf16(
      _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_fpclass_ps_mask(a, 0x18)), remainder));
}

inline __m512i join_pairs(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Of how many pairs of rows the sums of dA and dB take h and dh with their remainder, which costs a
// second product. Rounding them as plain PyTorch does is about as wrong as rounding the result:
// with all remainders the error is 0.7 of plain PyTorch's, with a quarter of them 0.94.
inline int64_t exact_row_pairs(int64_t rows, bool few) {
  const int64_t pairs = (rows + 1) / 2;
  return few ? pairs : (pairs + 3) / 4;
}

struct Bf16DotMath {
  using Base = BFloat16;
  using Sum = float;
  using Hidden = float;  // results in bf16 would not show more
  using Element = BFloat16;

  // Twice those of FloatMath: what is not widened takes half the cache, and the sums of dA and dB
  // are loaded and stored half as often.
  static constexpr int64_t kPanelRows = 96;
  static constexpr int64_t kChunk = 1024;  // columns copied at a time, and added up in sequence
  static constexpr int64_t kFewRows = 0;
  static constexpr int64_t kStride = kChunk + kCacheLine / sizeof(Element);
  static constexpr bool kCopies = false;

  // Value and remainder of the rows of h or dh, each filled up to pairs; or of its columns, of
  // which the rows are.
  static int64_t operand_bytes(int64_t r) { return 2 * kPanelRows * 4 * row_pairs(2 * r); }

  // factor * values [rows, r] as left operand; with its remainder if `exact`
  static Words rows(void* operand, const float* values, int64_t rows, int64_t r, double factor,
                    bool exact) {
    const int64_t padded = 2 * row_pairs(r), remainder = kPanelRows * padded;
    auto* out = static_cast<uint16_t*>(operand);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < r; j += 16) {
        const __m512 scaled = load_scaled(values + i * r + j, r - j, factor);
        const __m256i value = round_bf16(scaled);
        uint16_t* p = out + i * padded + j;
        _mm256_mask_storeu_epi16(p, first_lanes(padded - j), value);
        _mm256_mask_storeu_epi16(p + remainder, first_lanes(padded - j),
                                 round_remainder(scaled, value));
      }
    }
    return {.data = static_cast<const char*>(operand),
            .row_bytes = 2 * padded,
            .pair_bytes = 4,
            .remainder_bytes = 2 * remainder,
            .exact = exact ? row_pairs(r) : 0};
  }

  // its transpose
  static Words columns(void* operand, const float* values, int64_t rows, int64_t r, double factor,
                       bool few) {
    const int64_t remainder = kPanelRows / 2 * r;
    auto* out = static_cast<uint32_t*>(operand);
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < r; j += 16) {
        const __m512 first = load_scaled(values + i * r + j, r - j, factor);
        const __m512 second = i + 1 < rows ? load_scaled(values + (i + 1) * r + j, r - j, factor)
                                           : _mm512_setzero_ps();
        const __m256i first_value = round_bf16(first), second_value = round_bf16(second);
        uint32_t* p = out + i / 2 * r + j;
        _mm512_mask_storeu_epi32(p, first_lanes(r - j), join_pairs(first_value, second_value));
        _mm512_mask_storeu_epi32(
            p + remainder, first_lanes(r - j),
            join_pairs(round_remainder(first, first_value), round_remainder(second, second_value)));
      }
    }
    return {.data = static_cast<const char*>(operand),
            .row_bytes = 4,
            .pair_bytes = 4 * r,
            .remainder_bytes = 4 * remainder,
            .exact = exact_row_pairs(rows, few)};
  }

  static Words left(const BFloat16* data, int64_t stride, bool cold) {
    return {.data = reinterpret_cast<const char*>(data),
            .row_bytes = 2 * stride,
            .pair_bytes = 4,
            .cold = cold};
  }
  static RowPairs right(const BFloat16* data, int64_t stride, bool cold) {
    return {data, stride, cold};
  }
  static RowPairs adapter(const void* data, int64_t stride) {
    return {static_cast<const BFloat16*>(data), stride};
  }
  static RowPairs wide_adapter(const void* data, int64_t stride) { return adapter(data, stride); }
  static PackedPairs packed(const void* data, int64_t stride) {
    return {static_cast<const uint32_t*>(data), stride};
  }

  // out [rows, columns], kStride apart = in where kept, else 0
  static void copy(const BFloat16* in, int64_t stride, int64_t rows, int64_t columns,
                   const uint16_t* keep, int64_t keep_stride, BFloat16* out) {
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t* bits = keep ? keep + i * keep_stride : nullptr;
      for (int64_t j = 0; j < columns; j += 32) {
        __mmask32 lanes = columns - j >= 32 ? ~0u : (1u << (columns - j)) - 1u;
        if (bits) lanes &= bits[j / 16] | static_cast<uint32_t>(bits[j / 16 + 1]) << 16;
        const BFloat16* p = in + i * stride + j;
        _mm512_storeu_si512(out + i * kStride + j, _mm512_maskz_loadu_epi16(lanes, p));
        prefetch(p + stride);
      }
    }
  }

  // out [rows, r] = a b, or += it
  template <class Right>
  static void hidden_product(int64_t rows, int64_t r, int64_t K, const Words& a, const Right& b,
                             bool add, bool /*few*/, Hidden* out) {
    product(rows, r, K, a, b, StoreSum<Sum>{out, r, add});
  }

  template <class Right, class Store>
  static void product(int64_t rows, int64_t columns, int64_t K, const Words& a, const Right& b,
                      const Store& store) {
    dot_gemm(rows, columns, K, a, b, store);
  }
  template <class Right, class Store>
  static void sum_of_rows(int64_t rows, int64_t columns, int64_t K, const Words& a, const Right& b,
                          const Store& store) {
    dot_gemm(rows, columns, K, a, b, store);
  }

 private:
  static int64_t row_pairs(int64_t r) { return (r + 1) / 2; }
  static __m512 load_scaled(const float* p, int64_t lanes, double factor) {
    return _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(factor)),
                         _mm512_maskz_loadu_ps(first_lanes(lanes), p));
  }
};

inline int64_t packed_pairs_bytes(int64_t rows, int64_t columns) {
  return 4 * rows * ((columns + 1) / 2);
}

// Rows [begin, end) of in [rows, columns] as words of neighbouring columns, transposed:
// out [ceil(columns / 2), rows].
inline void pack_pairs(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                       void* out) {
  const auto* data = static_cast<const uint16_t*>(in);
  auto* words = static_cast<float*>(out);
  transpose_rows<float>(
      begin, end, (columns + 1) / 2,
      [&](int64_t i, int64_t pair, int) {
        const int64_t left = columns - 2 * pair;
        const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1u;
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, data + i * columns + 2 * pair));
      },
      [&](int64_t pair, int64_t i, int lanes, __m512 values) {
        Vec<float>::store_partial(words + pair * rows + i, values, lanes);
      });
}

}  // namespace lora_ext::LORA_EXT_ISA
