// lora_linear on a range of rows for bf16 base and adapters, without widening them: the counterpart
// of lora_linear_rows.h. h and dh are sums in float; where a product reads them again they are given
// as two bf16, value and remainder, if the result is a gradient of an adapter, and rounded once if
// it is added to y or dx.
#pragma once

#include "../kernels.h"
#include "bf16_dot.h"
#include "panel.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

// Twice the rows of panel.h: what is not widened takes half the cache, and the sums of dA and dB are
// loaded and stored half as often.
constexpr int64_t kDotPanelRows = 96;

// The scratch of one thread.
struct DotPanel {
  static constexpr int64_t kColumns = 256;
  static constexpr int64_t kStride = kColumns + 32;  // keeps rows from sharing a cache set

  int64_t r;
  BFloat16* in;     // [kDotPanelRows, kStride]: columns of x or dy, without dropped elements
  float* h;         // [kDotPanelRows, r]
  float* dh;        // [kDotPanelRows, r]
  uint32_t* pairs;  // [2 terms, kDotPanelRows / 2, r]: neighbouring rows of h or dh
  uint32_t* rows;   // [2 terms, kDotPanelRows, ceil(r / 2)]: neighbouring columns of h or dh
  uint16_t* keep;   // [kDotPanelRows, keep_words(K)]

  DotPanel(void* scratch, int64_t rank) : r(rank) {
    in = static_cast<BFloat16*>(scratch);
    h = reinterpret_cast<float*>(in + kDotPanelRows * kStride);
    dh = h + kDotPanelRows * r;
    pairs = reinterpret_cast<uint32_t*>(dh + kDotPanelRows * r);
    rows = pairs + kDotPanelRows * r;
    keep = reinterpret_cast<uint16_t*>(rows + 2 * kDotPanelRows * row_words());
  }

  static int64_t bytes(int64_t K, int64_t r) {
    return kDotPanelRows * (2 * kStride + 16 * r + 4 + 2 * keep_words(K));
  }
  int64_t row_words() const { return (r + 1) / 2; }

  // `exact`: of how many pairs the remainder counts.
  Words row_pairs(int64_t exact) const {
    return {reinterpret_cast<const char*>(pairs), 4, 4 * r, 4 * (kDotPanelRows / 2) * r, exact};
  }
  Words column_pairs(int64_t exact) const {
    return {reinterpret_cast<const char*>(rows), 4 * row_words(), 4, 4 * kDotPanelRows * row_words(),
            exact};
  }
};

inline __m256i round_bf16(DotReg a) { return (__m256i)_mm512_cvtneps_pbh(a); }

inline DotReg widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// What rounding to bf16 leaves of a; nothing of infinity.
inline __m256i round_remainder(DotReg a, __m256i rounded) {
  const DotReg remainder = _mm512_sub_ps(a, widen_bf16(rounded));
  return round_bf16(_mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_fpclass_ps_mask(a, 0x18)),
                                        remainder));
}

inline __m512i join_pairs(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// panel.pairs = value and remainder of scale * values[rows, r], pairs of neighbouring rows
inline void split_row_pairs(const DotPanel& panel, const float* values, int64_t rows, float scale) {
  const int64_t r = panel.r;
  const DotReg factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < r; j += 16) {
      const __mmask16 lanes = first_lanes(r - j);
      const auto load = [&](int64_t row) {
        return row < rows
                   ? _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(lanes, values + row * r + j))
                   : _mm512_setzero_ps();
      };
      const DotReg first = load(i), second = load(i + 1);
      const __m256i first_value = round_bf16(first), second_value = round_bf16(second);
      uint32_t* out = panel.pairs + i / 2 * r + j;
      _mm512_mask_storeu_epi32(out, lanes, join_pairs(first_value, second_value));
      _mm512_mask_storeu_epi32(out + kDotPanelRows / 2 * r, lanes,
                               join_pairs(round_remainder(first, first_value),
                                          round_remainder(second, second_value)));
    }
  }
}

// panel.rows = value and remainder of scale * values[rows, r], each row filled up to pairs
inline void split_rows(const DotPanel& panel, const float* values, int64_t rows, float scale) {
  const int64_t r = panel.r, padded = 2 * panel.row_words();
  const DotReg factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; ++i) {
    auto* out = reinterpret_cast<uint16_t*>(panel.rows) + i * padded;
    for (int64_t j = 0; j < r; j += 16) {
      const DotReg in = _mm512_maskz_loadu_ps(first_lanes(r - j), values + i * r + j);
      const DotReg scaled = _mm512_mul_ps(factor, in);
      const __m256i value = round_bf16(scaled);
      const __mmask16 lanes = first_lanes(padded - j);
      _mm256_mask_storeu_epi16(out + j, lanes, value);
      _mm256_mask_storeu_epi16(out + kDotPanelRows * padded + j, lanes,
                               round_remainder(scaled, value));
    }
  }
}

// sums[i][j] = result, or += result
struct StoreSum {
  float* sums;
  int64_t stride;
  bool add;

  void operator()(int64_t i, int64_t j, DotReg result, __mmask16 lanes) const {
    float* p = sums + i * stride + j;
    if (add) result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(lanes, p));
    _mm512_mask_storeu_ps(p, lanes, result);
  }
};

// out[i][j] = result + bias, or result where kept
struct StoreRounded {
  BFloat16* out;
  int64_t stride;
  const float* bias;
  const uint16_t* keep;
  int64_t keep_stride;

  void operator()(int64_t i, int64_t j, DotReg result, __mmask16 lanes) const {
    if (bias) result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(lanes, bias + j));
    if (keep) result = _mm512_maskz_mov_ps(keep[i * keep_stride + j / 16], result);
    _mm256_mask_storeu_epi16(out + i * stride + j, lanes, round_bf16(result));
  }
};

// panel.in[rows, columns] = in, or 0 where a bit of keep is 0.
inline void fetch_columns(const DotPanel& panel, const BFloat16* in, int64_t stride, int64_t rows,
                          int64_t columns, const uint16_t* keep, int64_t keep_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint16_t* bits = keep ? keep + i * keep_stride : nullptr;
    for (int64_t j = 0; j < columns; j += 32) {
      __mmask32 lanes = columns - j >= 32 ? ~0u : (1u << (columns - j)) - 1u;
      if (bits) lanes &= bits[j / 16] | static_cast<uint32_t>(bits[j / 16 + 1]) << 16;
      prefetch(in + i * stride + j + DotPanel::kColumns);
      _mm512_storeu_si512(panel.in + i * DotPanel::kStride + j,
                          _mm512_maskz_loadu_epi16(lanes, in + i * stride + j));
    }
  }
}

// out[rows, r] = in[rows, K] b, `in` dropped out where keep is given. Rows that share a cache set, as
// rows of 4096 elements do, are copied first: that costs less than losing each line before its end.
template <class B>
void down_product(const DotPanel& panel, const BFloat16* in, int64_t stride, int64_t rows,
                  int64_t K, const uint16_t* keep, const B& b, float* out) {
  const bool copies = keep || stride % 512 == 0;
  for (int64_t k = 0; k == 0 || k < K; k += DotPanel::kColumns) {
    const int64_t columns = at_most(K - k, DotPanel::kColumns);
    if (copies) {
      fetch_columns(panel, in + k, stride, rows, columns, keep ? keep + k / 16 : nullptr,
                    keep_words(K));
    }
    const Words words{
        .data = reinterpret_cast<const char*>(copies ? panel.in : in + k),
        .row_bytes = 2 * (copies ? DotPanel::kStride : stride),
        .pair_bytes = 4,
        .cold = !copies,
    };
    dot_gemm(rows, panel.r, columns, words, b.from_pair(k / 2), StoreSum{out, panel.r, k > 0});
  }
}

// The dropout bits of the panel's rows, or null without dropout.
inline const uint16_t* keep_bits(const DotPanel& panel, const DropoutArgs& dropout,
                                 int64_t first_row, int64_t rows, int64_t K) {
  if (!dropout.enabled) return nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    fill_keep_bits(dropout.rng, first_row + i, K, dropout.threshold,
                   panel.keep + i * keep_words(K));
  }
  return panel.keep;
}

inline void scale_in_place(float* values, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

inline void dot_forward_rows(const ForwardArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t K = args.K, N = args.N, r = args.r;
  const DotPanel panel(scratch, r);
  const PairRows A_t{static_cast<const uint32_t*>(args.lora_A_t), r};
  const PairRows B_t{static_cast<const uint32_t*>(args.lora_B_t), N};
  const float survivor = args.dropout.enabled ? static_cast<float>(args.dropout.scale) : 1.0f;
  const float scaling = static_cast<float>(args.scaling);

  for (int64_t m = begin; m < end; m += kDotPanelRows) {
    const int64_t rows = at_most(end - m, kDotPanelRows);
    const uint16_t* keep = keep_bits(panel, args.dropout, m, rows, K);

    // h = dropout(x) A^T
    down_product(panel, static_cast<const BFloat16*>(args.x) + m * args.ldx, args.ldx, rows, K,
                 keep, A_t, panel.h);
    scale_in_place(panel.h, rows * r, survivor);
    if (args.h) std::memcpy(static_cast<float*>(args.h) + m * r, panel.h, rows * r * sizeof(float));

    // y = scaling * h B^T + bias
    split_rows(panel, panel.h, rows, scaling);
    auto* y = static_cast<BFloat16*>(args.y) + m * N;
    dot_gemm(rows, N, r, panel.column_pairs(panel.row_words()), B_t,
                    StoreRounded{y, N, static_cast<const float*>(args.bias), nullptr, 0});
  }
}

// Of how many pairs of rows the sums of dA and dB take h and dh with their remainder, which costs a
// second product. Rounding them as plain PyTorch does is about as wrong as rounding the result: all
// remainders make 0.7 of its error, a quarter of them 0.94. Beside a small rank the base product
// hides the cost.
inline int64_t exact_row_pairs(int64_t rows, int64_t r) {
  const int64_t pairs = (rows + 1) / 2;
  return r <= 16 ? pairs : (pairs + 3) / 4;
}

// dB_sum is [N, r] transposed, for its vectors to lie along dy.
inline void dot_backward_rows(const BackwardArgs& args, int64_t begin, int64_t end, void* dA_sum,
                              void* dB_sum, void* scratch) {
  const int64_t K = args.K, N = args.N, r = args.r;
  const DotPanel panel(scratch, r);
  const ElementRows A{static_cast<const BFloat16*>(args.lora_A), K};
  const ElementRows B{static_cast<const BFloat16*>(args.lora_B), r};
  const PairRows A_t{static_cast<const uint32_t*>(args.lora_A_t), r};
  auto* dA = static_cast<float*>(dA_sum);
  auto* dB = static_cast<float*>(dB_sum);
  auto* dx = static_cast<BFloat16*>(args.dx);
  const bool recompute_h = dB && !args.h;
  const float survivor = args.dropout.enabled ? static_cast<float>(args.dropout.scale) : 1.0f;
  const float scaling = static_cast<float>(args.scaling);

  for (int64_t m = begin; m < end; m += kDotPanelRows) {
    const int64_t rows = at_most(end - m, kDotPanelRows);
    const bool later = m > begin;  // the first panel starts the sums, later ones add to them
    const int64_t exact = exact_row_pairs(rows, r);
    const uint16_t* keep =
        dx || dA || recompute_h ? keep_bits(panel, args.dropout, m, rows, K) : nullptr;
    const auto* x = static_cast<const BFloat16*>(args.x) + m * args.ldx;
    const auto* dy = static_cast<const BFloat16*>(args.dy) + m * args.lddy;

    // dh = dy B, still without scales
    if (dA || dx) down_product(panel, dy, args.lddy, rows, N, nullptr, B, panel.dh);

    // dB += h^T dy, transposed
    if (dB) {
      const float* h = static_cast<const float*>(args.h) + m * r;
      if (recompute_h) {
        down_product(panel, x, args.ldx, rows, K, keep, A_t, panel.h);
        h = panel.h;
      }
      split_row_pairs(panel, h, rows, recompute_h ? survivor : 1.0f);
      dot_gemm(r, N, rows, panel.row_pairs(exact), ElementRows{dy, args.lddy},
               StoreSum{dB, N, later});
    }

    // dA += dh^T dropout(x) and dx = dropout'(dh A)
    if (dA) {
      split_row_pairs(panel, panel.dh, rows, scaling * survivor);
      if (keep) {
        for (int64_t k = 0; k < K; k += DotPanel::kColumns) {
          const int64_t columns = at_most(K - k, DotPanel::kColumns);
          fetch_columns(panel, x + k, args.ldx, rows, columns, keep + k / 16, keep_words(K));
          dot_gemm(r, columns, rows, panel.row_pairs(exact), ElementRows{panel.in, DotPanel::kStride},
                      StoreSum{dA + k, K, later});
        }
      } else {
        dot_gemm(r, K, rows, panel.row_pairs(exact), ElementRows{x, args.ldx},
                    StoreSum{dA, K, later});
      }
    }
    if (dx) {
      split_rows(panel, panel.dh, rows, scaling * survivor);
      dot_gemm(rows, K, r, panel.column_pairs(0), A,
                      StoreRounded{dx + m * K, K, nullptr, keep, keep_words(K)});
    }
  }
}

// a[i][j] and a[j][i] change places.
inline void transpose_16x16(DotReg* a) {
  DotReg b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto low = [](DotReg x, DotReg y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](DotReg x, DotReg y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  // c[4g + l]: lane l of each quarter of rows 4g .. 4g + 3
  DotReg c[16];
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    c[g] = low(b[g], b[g + 2]);
    c[g + 1] = high(b[g], b[g + 2]);
    c[g + 2] = low(b[g + 1], b[g + 3]);
    c[g + 3] = high(b[g + 1], b[g + 3]);
  }
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    const DotReg even_low = _mm512_shuffle_f32x4(c[l], c[4 + l], 0x88);
    const DotReg odd_low = _mm512_shuffle_f32x4(c[l], c[4 + l], 0xDD);
    const DotReg even_high = _mm512_shuffle_f32x4(c[8 + l], c[12 + l], 0x88);
    const DotReg odd_high = _mm512_shuffle_f32x4(c[8 + l], c[12 + l], 0xDD);
    a[l] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    a[4 + l] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    a[8 + l] = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    a[12 + l] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
  }
}

inline int64_t packed_pairs_bytes(int64_t rows, int64_t columns) {
  return 4 * rows * ((columns + 1) / 2);
}

// Rows [begin, end) of in [rows, columns] as words of neighbouring columns, transposed:
// out [ceil(columns / 2), rows].
inline void pack_pairs(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                       void* out) {
  const auto* data = static_cast<const uint16_t*>(in);
  auto* words = static_cast<uint32_t*>(out);
  const int64_t pairs = (columns + 1) / 2;
  for (int64_t i = begin; i < end; i += 16) {
    const int64_t height = at_most(end - i, 16);
    for (int64_t p = 0; p < pairs; p += 16) {
      const int64_t left = columns - 2 * p;
      const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1u;
      DotReg block[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) {
        block[l] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(
            l < height ? lanes : 0u, data + at_most(i + l, end - 1) * columns + 2 * p));
      }
      transpose_16x16(block);
      const int64_t width = at_most(pairs - p, 16);
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) {
        if (l < width) {
          _mm512_mask_storeu_ps(words + (p + l) * rows + i, first_lanes(height), block[l]);
        }
      }
    }
  }
}

// Rows [begin, end) of out [N, r] = scale * sum over p of parts[p * stride ..], each [r, N].
inline void dot_reduce_b(const void* parts, int64_t count, int64_t stride, double scale, int64_t N,
                         int64_t r, int64_t begin, int64_t end, void* out) {
  const auto* in = static_cast<const float*>(parts);
  auto* dB = static_cast<BFloat16*>(out);
  const DotReg factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int64_t n = begin; n < end; n += 16) {
    const int64_t height = at_most(end - n, 16);
    for (int64_t j = 0; j < r; j += 16) {
      const int64_t width = at_most(r - j, 16);
      DotReg block[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) {
        block[l] = _mm512_setzero_ps();
        for (int64_t p = 0; l < width && p < count; ++p) {
          const float* sums = in + p * stride + (j + l) * N + n;
          block[l] = _mm512_add_ps(block[l], _mm512_maskz_loadu_ps(first_lanes(height), sums));
        }
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) {
        if (l < height) {
          _mm256_mask_storeu_epi16(dB + (n + l) * r + j, first_lanes(width),
                                   round_bf16(_mm512_mul_ps(block[l], factor)));
        }
      }
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
