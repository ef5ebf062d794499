// Rows as the products need them: the dropout decisions as packed bits (bit c % 16 of word c / 16
// is column c), and copies of rows without the dropped elements.
#pragma once

#include "../dropout_kernels.h"
#include "prefetch.h"
#include "vec.h"

namespace lora_ext::LORA_EXT_ISA {

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

inline int64_t keep_words(int64_t columns) {
  return (columns + kDropoutBlock - 1) / kDropoutBlock * kDropoutSlots;
}

// words[kDropoutSlots]: the decisions of one block of 128 columns. The rounds of philox.h, lane by
// lane.
inline void fill_keep_block(DropoutRng rng, int64_t row, int64_t block, uint32_t threshold,
                            uint16_t* words) {
  using Reg = U32::Reg;
  uint32_t bits[kDropoutSlots] = {};
  for (int lane = 0; lane < kDropoutLanes; lane += U32::kWidth) {
    const PhiloxBlock counter = dropout_counter(rng.offset, row, block, lane);
    Reg c0 = U32::iota(counter.word[0]);
    Reg c1 = U32::set1(counter.word[1]);
    Reg c2 = U32::set1(counter.word[2]);
    Reg c3 = U32::set1(counter.word[3]);
    uint32_t key0 = static_cast<uint32_t>(rng.seed);
    uint32_t key1 = static_cast<uint32_t>(rng.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      Reg high0, low0, high1, low1;
      U32::multiply(c0, kPhiloxMultiplier0, high0, low0);
      U32::multiply(c2, kPhiloxMultiplier1, high1, low1);
      c0 = U32::bit_xor(high1, c1, U32::set1(key0));
      c1 = low1;
      c2 = U32::bit_xor(high0, c3, U32::set1(key1));
      c3 = low0;
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
    const Reg word[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      bits[2 * w] |= U32::low_half_below(word[w], threshold) << lane;
      bits[2 * w + 1] |= U32::high_half_below(word[w], threshold) << lane;
    }
  }
  for (int slot = 0; slot < kDropoutSlots; ++slot) words[slot] = static_cast<uint16_t>(bits[slot]);
}

// words[keep_words(columns)]: the decisions of one row.
inline void fill_keep_bits(DropoutRng rng, int64_t row, int64_t columns, uint32_t threshold,
                           uint16_t* words) {
  for (int64_t block = 0; block * kDropoutBlock < columns; ++block) {
    fill_keep_block(rng, row, block, threshold, words + block * kDropoutSlots);
  }
}

inline uint32_t bits_at(const uint16_t* keep, int64_t column) {
  return static_cast<uint32_t>(keep[column / 16] >> (column % 16));
}

// All kWidth lanes, or the first `lanes`.
template <class S, class T>
inline typename Vec<S>::Reg load_lanes(const T* p, int lanes) {
  return lanes == Vec<S>::kWidth ? Vec<S>::load(p) : Vec<S>::load_partial(p, lanes);
}

template <class S, class T>
inline void store_lanes(T* p, typename Vec<S>::Reg a, int lanes) {
  if (lanes == Vec<S>::kWidth) {
    Vec<S>::store(p, a);
  } else {
    Vec<S>::store_partial(p, a, lanes);
  }
}

// The dropout bits of `rows` rows of K columns, or null without dropout.
inline const uint16_t* fill_panel_bits(const DropoutArgs& dropout, int64_t first_row, int64_t rows,
                                       int64_t K, uint16_t* keep) {
  if (!dropout.enabled) return nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = dropout.rows ? dropout.rows[first_row + i] : first_row + i;
    fill_keep_bits(dropout.rng, row, K, dropout.threshold, keep + i * keep_words(K));
  }
  return keep;
}

// out[rows, columns] = in where kept, else 0
template <class S, class T>
void copy_kept(const T* in, int64_t stride, int64_t rows, int64_t columns, const uint16_t* keep,
               int64_t keep_stride, S* out, int64_t out_stride) {
  using V = Vec<S>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      const int lanes = static_cast<int>(at_most(columns - j, V::kWidth));
      const T* p = in + i * stride + j;
      auto value = load_lanes<S>(p, lanes);
      if (keep) value = V::keep(value, bits_at(keep + i * keep_stride, j));
      store_lanes<S>(out + i * out_stride + j, value, lanes);
      prefetch(p + stride);  // one row of several at a time is too few for the CPU to foresee it
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
