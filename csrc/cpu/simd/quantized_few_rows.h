// Few rows times a quantized matrix, whose codes are read once and become values in registers.
#pragma once

#include "quantized_rows.h"

namespace lora_ext::LORA_EXT_ISA {

// How many rows of x are multiplied at a time, and how many rows of W with them, whose sums and
// values lie in registers.
#if defined(__AVX512F__)
constexpr int kFewRowsAtOnce = 8;
#else
constexpr int kFewRowsAtOnce = 4;
#endif
constexpr int kFewColumns = 2;

constexpr int64_t kFewStep = 2 * Vec<float>::kWidth;  // codes of a step: two vectors of values

template <class T, bool kPlain>
using FormulaOfNumbers = BlockFormula<T, kPlain, /*kNumbers=*/true>;

// Of a step's bytes two vectors of values: by low nibbles and by high ones,
template <class T, bool kPlain>
struct NibbleValues {
  static constexpr int64_t kBytes = kFewStep / 2;
  Table16 codebook, table;

  explicit NibbleValues(const QuantizedMatrix& W) : codebook(codebook_of(W)) {}
  void start(const FormulaOfNumbers<T, kPlain>& formula) { table = values_of(codebook, formula); }
  void read(const uint8_t* bytes, Vec<float>::Reg* values) const {
    table.lookup_both(bytes, values[0], values[1]);
  }
};

// or by numbers of 8 bits, one after another.
template <class T, bool kPlain>
struct Int8Values {
  static constexpr int64_t kBytes = kFewStep;
  FormulaOfNumbers<T, kPlain> formula;

  explicit Int8Values(const QuantizedMatrix& W) : formula(W, 0, 0.0f, nullptr) {}
  void start(const FormulaOfNumbers<T, kPlain>& block) { formula = block; }
  void read(const uint8_t* bytes, Vec<float>::Reg* values) const {
    const auto* numbers = reinterpret_cast<const int8_t*>(bytes);
    values[0] = formula(Vec<float>::load(numbers));
    values[1] = formula(Vec<float>::load(numbers + Vec<float>::kWidth));
  }
};

// Whole steps and whole units.
inline int64_t step_of(const QuantizedMatrix& W) {
  const int64_t codes = unit_of(W.packing).codes;
  return codes > kFewStep ? codes : kFewStep;
}

// Whether all are finite.
inline bool all_finite(const float* numbers, int64_t count) {
  using V = Vec<float>;
  bool finite = true;
  for (int64_t i = 0; i < count; i += V::kWidth) {
    const int lanes = static_cast<int>(at_most(count - i, V::kWidth));
    finite &= V::all_finite(load_lanes<float>(numbers + i, lanes));
  }
  return finite;
}

// Whether rows, and the blocks of a row, are so many of these.
template <class T>
inline bool in_steps(const QuantizedMatrix& W) {
  if (std::is_same_v<T, double> || !(looks_up(W) || W.packing == QuantPacking::Int8)) return false;
  const int64_t step = step_of(W);
  return W.K % step == 0 && W.block_size % step == 0 &&
         (W.K % W.block_size == 0 || W.block_size % W.K == 0) && all_finite(&W.factor, 1) &&
         (!W.codebook || all_finite(W.codebook, 16));
}

// The column of W whose value is number i of those that the steps of a row make.
inline int64_t column_of(QuantPacking packing, int64_t i) {
  constexpr int kWidth = Vec<float>::kWidth;
  if (packing == QuantPacking::Int8) return i;
  const int64_t byte = i / kFewStep * kWidth + i % kWidth;
  const bool high = i % kFewStep >= kWidth;
  if (packing == QuantPacking::HighFirst) return 2 * byte + !high;
  if (packing == QuantPacking::LowFirst) return 2 * byte + high;
  const int64_t half = packing == QuantPacking::Halves16 ? 16 : 32;
  return byte / half * 2 * half + byte % half + (high ? half : 0);
}

// Rows of packed x: groups of as many as are multiplied at a time, the last ones zeros.
inline int64_t packed_rows(int64_t M) {
  for (int64_t rows = 1; rows < kFewRowsAtOnce; rows *= 2) {
    if (M <= rows) return rows;
  }
  return (M + kFewRowsAtOnce - 1) / kFewRowsAtOnce * kFewRowsAtOnce;
}

template <class T>
int64_t few_rows_bytes(const QuantizedMatrix& W, int64_t M) {
  return in_steps<T>(W) ? packed_rows(M) * W.K * static_cast<int64_t>(sizeof(float)) : 0;
}

// Group after group, of each step after step with all rows, in the order of the step's values.
template <class T>
void pack_few_rows(const QuantizedMatrix& W, const FewRowsArgs& args) {
  if (!in_steps<T>(W)) return;
  using S = compute_t<T>;
  constexpr int64_t kMost = 64;
  const int64_t K = W.K, step = step_of(W), rows = packed_rows(args.M);
  const int64_t at_once = at_most(rows, kFewRowsAtOnce);
  auto* const packed = static_cast<S*>(args.packed);
  memset(packed, 0, rows * K * sizeof(S));
  int64_t column[kMost];
  for (int64_t i = 0; i < step; ++i) column[i] = column_of(W.packing, i);
  S values[kMost];
  for (int64_t m = 0; m < args.M; ++m) {
    S* const group = packed + m / at_once * at_once * K + m % at_once * kFewStep;
    const T* const x = static_cast<const T*>(args.x) + m * args.ldx;
    for (int64_t k = 0; k < K; k += step) {
      copy_kept(x + k, 0, 1, step, nullptr, 0, values, step);
      for (int64_t i = 0; i < step; ++i) {
        group[(k + i) / kFewStep * kFewStep * at_once + i % kFewStep] = values[column[i]];
      }
    }
  }
}

template <class T>
inline void put_sum(const FewRowsArgs& args, int64_t m, int64_t n, compute_t<T> sum) {
  using V = Vec<compute_t<T>>;
  T* const y = static_cast<T*>(args.y) + m * args.ldy + n;
  auto result = V::set1(sum);
  if (args.add) result = V::add(result, V::load_partial(y, 1));
  V::store_partial(y, result, 1);
}

// sums[i] += the products of values[count] and row i of x, lane by lane
template <int kRows, class S, class T>
inline void add_products(int64_t count, const S* values, const T* x, int64_t ldx,
                         typename Vec<S>::Reg* sums) {
  using V = Vec<S>;
  for (int64_t k = 0; k < count; k += V::kWidth) {
    const int lanes = static_cast<int>(at_most(count - k, V::kWidth));
    const auto w = load_lanes<S>(values + k, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sums[i] = V::fma(w, load_lanes<S>(x + i * ldx + k, lanes), sums[i]);
    }
  }
}

// Columns [begin, end) of y for any matrix: a chunk of a row of W is written into the L1 cache.
template <class T>
void few_rows_in_chunks(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t begin,
                        int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  S values[kCodeChunk];
  for (int64_t n = begin; n < end; ++n) {
    typename V::Reg sums[kFewRows];
    for (auto& sum : sums) sum = V::zero();
    for (int64_t k = 0; k < W.K; k += kCodeChunk) {
      const int64_t count = at_most(W.K - k, kCodeChunk);
      S* const p = values;
      for_values<T>(W, n * W.K + k, count, [p](int64_t j, Vec<float>::Reg part, int lanes) {
        store_values(p + j, part, lanes);
      });
      const T* const x = static_cast<const T*>(args.x) + k;
      int64_t m = 0;
      for (; m + 4 <= args.M; m += 4) {
        add_products<4>(count, values, x + m * args.ldx, args.ldx, sums + m);
      }
      for (; m < args.M; ++m) {
        add_products<1>(count, values, x + m * args.ldx, args.ldx, sums + m);
      }
    }
    for (int64_t m = 0; m < args.M; ++m) put_sum<T>(args, m, n, V::sum(sums[m]));
  }
}

// Columns [n, n + kColumns) of rows [m, m + kRows) of y; false, and nothing, where a number of
// their blocks is not finite.
template <class T, bool kPlain, template <class, bool> class Values, int kRows, int kColumns>
inline bool few_rows_tile(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t m, int64_t n) {
  using V = Vec<float>;
  constexpr int64_t kBlocks = 64;  // whose numbers are made at a time
  // Few sums would wait for themselves.
  constexpr int kSums = kRows <= 2 ? 2 : 1;
  static_assert(kColumns <= 2);
  const int64_t K = W.K, size = at_most(W.block_size, K), blocks = K / size;
  const auto* x = static_cast<const float*>(args.packed) + m * K;
  float scale_room[kColumns][kBlocks], shift_room[kColumns][kBlocks];
  const float *scales[kColumns], *shifts[kColumns];
  const uint8_t* codes[kColumns];
  int64_t first_block[kColumns];
  typename V::Reg sums[kColumns][kRows][kSums];
#pragma GCC unroll 2
  for (int c = 0; c < kColumns; ++c) {
    codes[c] = W.codes + (n + c) * K / kFewStep * Values<T, kPlain>::kBytes;
    first_block[c] = (n + c) * K / W.block_size;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int s = 0; s < kSums; ++s) sums[c][i][s] = V::zero();
    }
  }
  Values<T, kPlain> values[2] = {Values<T, kPlain>(W), Values<T, kPlain>(W)};
  for (int64_t begin = 0; begin < blocks; begin += kBlocks) {
    const int64_t count = at_most(blocks - begin, kBlocks);
    for (int c = 0; c < kColumns; ++c) {
      const int64_t block = first_block[c] + begin;
      const bool shifted = !kPlain && W.shift.values;
      scales[c] = numbers_at(W.scales, block, count, scale_room[c]);
      shifts[c] = shifted ? numbers_at(W.shift, block, count, shift_room[c]) : nullptr;
      if (!all_finite(scales[c], count)) return false;
      if (shifted && !all_finite(shifts[c], count)) return false;
    }
    for (int64_t b = 0; b < count; ++b) {
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) {
        values[c].start(FormulaOfNumbers<T, kPlain>(W, first_block[c] + begin + b, scales[c][b],
                                                    shifts[c] ? shifts[c] + b : nullptr));
      }
      for (const float* end = x + size * kRows; x < end; x += kFewStep * kRows) {
        typename V::Reg w[kColumns][2];
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; ++c) {
          values[c].read(codes[c], w[c]);
          codes[c] += Values<T, kPlain>::kBytes;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto first = apart(V::load(x + i * kFewStep)),
                     second = apart(V::load(x + i * kFewStep + V::kWidth));
#pragma GCC unroll 2
          for (int c = 0; c < kColumns; ++c) {
            auto& sum = sums[c][i];
            sum[0] = V::fma(w[c][0], first, sum[0]);
            sum[kSums - 1] = V::fma(w[c][1], second, sum[kSums - 1]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      auto sum = sums[c][i][0];
      if (kSums == 2) sum = V::add(sum, sums[c][i][kSums - 1]);
      if (m + i < args.M) put_sum<T>(args, m + i, n + c, V::sum(sum));
    }
  }
  return true;
}

template <class T, bool kPlain, template <class, bool> class Values, int kRows, int kColumns>
inline void few_rows_tiles(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t n) {
  for (int64_t m = 0; m < args.M; m += kRows) {
    if (!few_rows_tile<T, kPlain, Values, kRows, kColumns>(W, args, m, n)) {
      return few_rows_in_chunks<T>(W, args, n, n + kColumns);  // at m = 0 already
    }
  }
}

template <class T, bool kPlain, template <class, bool> class Values, int kRows>
void few_rows_by_tiles(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t begin,
                       int64_t end) {
  int64_t n = begin;
  for (; n + kFewColumns <= end; n += kFewColumns) {
    few_rows_tiles<T, kPlain, Values, kRows, kFewColumns>(W, args, n);
  }
  for (; n < end; ++n) few_rows_tiles<T, kPlain, Values, kRows, 1>(W, args, n);
}

template <class T, bool kPlain, template <class, bool> class Values>
void few_rows_in_steps(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t begin,
                       int64_t end) {
  switch (packed_rows(args.M)) {
    case 1:
      return few_rows_by_tiles<T, kPlain, Values, 1>(W, args, begin, end);
    case 2:
      return few_rows_by_tiles<T, kPlain, Values, 2>(W, args, begin, end);
    case 4:
      return few_rows_by_tiles<T, kPlain, Values, 4>(W, args, begin, end);
    default:
      return few_rows_by_tiles<T, kPlain, Values, kFewRowsAtOnce>(W, args, begin, end);
  }
}

template <class T>
void few_rows(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t begin, int64_t end) {
  if (!in_steps<T>(W)) return few_rows_in_chunks<T>(W, args, begin, end);
  if constexpr (!std::is_same_v<T, double>) {
    const bool numbers = W.packing == QuantPacking::Int8;
    const auto run = numbers       ? is_plain(W) ? few_rows_in_steps<T, true, Int8Values>
                                                 : few_rows_in_steps<T, false, Int8Values>
                           : is_plain(W) ? few_rows_in_steps<T, true, NibbleValues>
                                   : few_rows_in_steps<T, false, NibbleValues>;
    run(W, args, begin, end);
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
