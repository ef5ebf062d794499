// Row conversions between storage and compute types, with dropout and bias on the way, and the
// dropout decisions themselves as packed bits (bit c % 16 of word c / 16 is column c).
#pragma once

#include "../../common/dropout.h"
#include "vec.h"

namespace lora_ext::LORA_EXT_ISA {

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

// out = in, or scale * in where kept and 0 elsewhere.
template <class T, class S>
inline void widen_row(const T* in, int64_t columns, const uint16_t* keep, S scale, S* out) {
  using V = Vec<S>;
  const auto factor = V::set1(scale);
  int64_t j = 0;
  for (; j + V::kWidth <= columns; j += V::kWidth) {
    auto value = V::load(in + j);
    if (keep) value = V::keep(V::mul(value, factor), bits_at(keep, j));
    V::store(out + j, value);
  }
  if (j < columns) {
    const int lanes = static_cast<int>(columns - j);
    auto value = V::load_partial(in + j, lanes);
    if (keep) value = V::keep(V::mul(value, factor), bits_at(keep, j));
    V::store_partial(out + j, value, lanes);
  }
}

// out = round(in + bias), or round(scale * in where kept).
template <class T, class S>
inline void narrow_row(const S* in, int64_t columns, const S* bias, const uint16_t* keep, S scale,
                       T* out) {
  using V = Vec<S>;
  const auto factor = V::set1(scale);
  int64_t j = 0;
  for (; j + V::kWidth <= columns; j += V::kWidth) {
    auto value = V::load(in + j);
    if (bias) value = V::add(value, V::load(bias + j));
    if (keep) value = V::keep(V::mul(value, factor), bits_at(keep, j));
    V::store(out + j, value);
  }
  if (j < columns) {
    const int lanes = static_cast<int>(columns - j);
    auto value = V::load_partial(in + j, lanes);
    if (bias) value = V::add(value, V::load_partial(bias + j, lanes));
    if (keep) value = V::keep(V::mul(value, factor), bits_at(keep, j));
    V::store_partial(out + j, value, lanes);
  }
}

// Rows [begin, end) of out [rows, columns] = scale * sum over p of parts[p * stride ..].
template <class T, class TA>
void reduce(const void* parts, int64_t count, int64_t stride, double scale, int64_t /*rows*/,
            int64_t columns, int64_t begin, int64_t end, void* out) {
  using V = Vec<compute_t<T>>;
  const auto* in = static_cast<const compute_t<T>*>(parts);
  const auto factor = V::set1(static_cast<compute_t<T>>(scale));
  for (int64_t i = begin * columns; i < end * columns; i += V::kWidth) {
    const int64_t left = end * columns - i;
    const int lanes = static_cast<int>(left < V::kWidth ? left : V::kWidth);
    auto sum = V::load_partial(in + i, lanes);
    for (int64_t p = 1; p < count; ++p) {
      sum = V::add(sum, V::load_partial(in + p * stride + i, lanes));
    }
    V::store_partial(static_cast<TA*>(out) + i, V::mul(sum, factor), lanes);
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
