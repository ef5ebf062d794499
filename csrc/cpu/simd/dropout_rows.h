// Dropout on a range of rows, and its mask.
#pragma once

#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

// Rows [begin, end) of out [M, K] = dropout(x), by the mask's rows from first_row on
template <class T>
void dropout_rows(const void* x, int64_t ldx, int64_t K, const DropoutArgs& dropout,
                  int64_t first_row, int64_t begin, int64_t end, void* out) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const auto survivor = V::set1(static_cast<S>(dropout.survivor));
  for (int64_t m = begin; m < end; ++m) {
    const T* in = static_cast<const T*>(x) + m * ldx;
    T* row = static_cast<T*>(out) + m * K;
    for (int64_t block = 0; block < K; block += kDropoutBlock) {
      uint16_t words[kDropoutSlots];
      fill_keep_block(dropout.rng, first_row + m, block / kDropoutBlock, dropout.threshold, words);
      const int64_t end_column = block + at_most(K - block, kDropoutBlock);
      for (int64_t j = block; j < end_column; j += V::kWidth) {
        const int lanes = static_cast<int>(at_most(end_column - j, V::kWidth));
        const auto value = V::mul(load_lanes<S>(in + j, lanes), survivor);
        store_lanes<S>(row + j, V::keep(value, bits_at(words, j - block)), lanes);
      }
    }
  }
}

// keep [end - begin, columns]: rows [begin, end) of the mask, a byte each
inline void dropout_mask_rows(DropoutRng rng, uint32_t threshold, int64_t columns, int64_t begin,
                              int64_t end, uint8_t* keep) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < columns; column += kDropoutBlock) {
      uint16_t words[kDropoutSlots];
      fill_keep_block(rng, row, column / kDropoutBlock, threshold, words);
      const int64_t width = at_most(columns - column, kDropoutBlock);
      for (int64_t j = 0; j < width; ++j) {
        keep[(row - begin) * columns + column + j] = words[j / 16] >> (j % 16) & 1u;
      }
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
