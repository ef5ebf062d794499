// Bf16DotMath with AMX's products: h and dh are given as value and remainder likewise, in whole
// tiles.
#pragma once

#include "amx.h"
#include "bf16_dot_math.h"

namespace lora_ext::LORA_EXT_ISA {

struct AmxMath : Bf16DotMath {
  static constexpr int64_t kPanelSteps = kPanelRows / kStep;
  static_assert(kPanelRows % kStep == 0 && kChunk % kStep == 0);

  static int64_t operand_bytes(int64_t r) { return 2 * kPanelRows * row_bytes(r); }

  // factor * values [rows, r] as left operand; with its remainder if `exact`
  static TileRows rows(void* operand, const float* values, int64_t rows, int64_t r, double factor,
                       bool exact) {
    const bool folded = exact && r <= kTile;
    const int64_t stride = row_bytes(r), remainder = folded ? 2 * kTile : kPanelRows * stride;
    auto* out = static_cast<char*>(operand);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < (folded ? kTile : stride / 2); j += kTile) {
        const __m512 scaled = scaled_part(values + i * r + j, r - j, factor);
        const __m256i value = round_bf16(scaled);
        auto* p = reinterpret_cast<__m256i*>(out + i * stride + 2 * j);
        _mm256_storeu_si256(p, value);
        if (exact) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<char*>(p) + remainder),
                              round_remainder(scaled, value));
        }
      }
    }
    return {.data = out,
            .row_bytes = stride,
            .padded = true,
            .remainder_bytes = remainder,
            .exact = exact && !folded ? stride / kTileRowBytes : 0,
            .folded = folded};
  }

  // its transpose
  static TileRows columns(void* operand, const float* values, int64_t rows, int64_t r,
                          double factor, bool few) {
    constexpr int64_t kRowBytes = kPanelSteps * kTileRowBytes;
    const int64_t steps = (rows + kStep - 1) / kStep, exact = few ? steps : at_most(steps, 1);
    const int64_t remainder = (r + kTile - 1) / kTile * kTile * kRowBytes;
    auto* out = static_cast<char*>(operand);
    for (int64_t j = 0; j < r; j += kTile) {
      for (int64_t step = 0; step < steps; ++step) {
        __m512 value[kTile], rest[kTile];
        for (int64_t pair = 0; pair < kTile; ++pair) {
          const int64_t i = step * kStep + 2 * pair;
          const auto row = [&](int64_t at) {
            return at < rows ? scaled_part(values + at * r + j, r - j, factor)
                             : _mm512_setzero_ps();
          };
          const __m512 first = row(i), second = row(i + 1);
          const __m256i first_value = round_bf16(first), second_value = round_bf16(second);
          value[pair] = _mm512_castsi512_ps(join_pairs(first_value, second_value));
          rest[pair] = _mm512_castsi512_ps(join_pairs(round_remainder(first, first_value),
                                                      round_remainder(second, second_value)));
        }
        const auto store = [&](__m512* block, char* p) {
          transpose_block<float>(block);
          for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_ps(p + i * kRowBytes, block[i]);
        };
        char* p = out + j * kRowBytes + step * kTileRowBytes;
        store(value, p);
        if (step < exact) store(rest, p + remainder);
      }
    }
    return {.data = out,
            .row_bytes = kRowBytes,
            .padded = true,
            .remainder_bytes = remainder,
            .exact = exact};
  }

  static TileRows left(const BFloat16* data, int64_t stride, bool cold) {
    return {.data = reinterpret_cast<const char*>(data), .row_bytes = 2 * stride, .cold = cold};
  }

  template <class Right>
  static void hidden_product(int64_t rows, int64_t r, int64_t K, const TileRows& a, const Right& b,
                             bool add, bool /*few*/, Hidden* out) {
    amx_gemm(rows, r, K, a, b, StoreSum<Sum>{out, r, add});
  }
  template <class Right, class Store>
  static void product(int64_t rows, int64_t columns, int64_t K, const TileRows& a, const Right& b,
                      const Store& store) {
    amx_gemm(rows, columns, K, a, b, store);
  }
  template <class Right, class Store>
  static void sum_of_rows(int64_t rows, int64_t columns, int64_t K, const TileRows& a,
                          const Right& b, const Store& store) {
    amx_gemm(rows, columns, K, a, b, store);
  }

 private:
  // A step even where there is no rank.
  static int64_t row_bytes(int64_t r) {
    return (r > 0 ? (r + kStep - 1) / kStep : 1) * kTileRowBytes;
  }
  // Lanes from `left` on, which may be none, are zero.
  static __m512 scaled_part(const float* p, int64_t left, double factor) {
    const __mmask16 lanes = left > 0 ? first_lanes(left) : static_cast<__mmask16>(0);
    return _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(factor)),
                         _mm512_maskz_loadu_ps(lanes, p));
  }
};

}  // namespace lora_ext::LORA_EXT_ISA
