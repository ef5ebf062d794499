// Dropout's decisions that one pass leaves for another (csrc/kernels/kept_bits.h), one by one.
#pragma once

#include "common/dropout.h"
#include "kernels/kept_bits.h"

namespace simt_test {

// Where the bit of an element lies, as kept_bits.h describes it.
struct KeptBit {
  uint32_t* word;
  int bit;

  KeptBit(const lora_ext::KeptBits& bits, int64_t row, int64_t column) {
    constexpr int kWordOfQuarter[] = {0, 2, 1, 3};
    const auto slot = static_cast<int>(column % 128 / 16), lane = static_cast<int>(column % 16);
    const int64_t tile = row / 128 * bits.blocks + column / 128;
    word = bits.data + (tile * 128 + row % 128) * 4 + kWordOfQuarter[lane / 4];
    bit = lane % 2 * 16 + lane % 4 / 2 * 8 + slot;
  }
  bool get() const { return *word >> bit & 1u; }
  void set(bool kept) const { *word = (*word & ~(1u << bit)) | uint32_t{kept} << bit; }
};

}  // namespace simt_test
