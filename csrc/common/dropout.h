// Which elements dropout keeps: one pure function of (seed, offset, row, column), used by every
// backend, in forward and in backward, whatever the tiling.
//
// A row is cut into blocks of 128 columns, a block into 8 slots of 16 columns. One Philox call
// gives 8 decisions of 16 bits: the 8 slots of one column-in-slot ("lane"). So 16 neighbouring
// columns are the same slot of 16 neighbouring counters, which is one SIMD vector on a CPU and the
// columns that a tensor-core fragment gives to neighbouring threads; nobody computes a decision
// that is unused.
#pragma once

#include <cstdint>

#include "philox.h"

namespace lora_ext {

constexpr int kDropoutLanes = 16;
constexpr int kDropoutSlots = 8;
constexpr int kDropoutBlock = kDropoutLanes * kDropoutSlots;

struct DropoutRng {
  uint64_t seed;
  uint64_t offset;
};

// The two words of an rng_state.
LORA_EXT_HOST_DEVICE DropoutRng dropout_rng(const int64_t* rng_state) {
  return {static_cast<uint64_t>(rng_state[0]), static_cast<uint64_t>(rng_state[1])};
}

// Keep when the 16 random bits are below this: keep probability rounded to 1/65536.
LORA_EXT_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>((1.0 - dropout_p) * 65536.0 + 0.5);
}

// Survivors are scaled by 1/(1-p), as torch.nn.functional.dropout does; p = 1 keeps nothing.
LORA_EXT_HOST_DEVICE double dropout_scale(double dropout_p) {
  return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0;
}

// The counter of the 8 decisions of one lane. Distinct for rows and offsets below 2^48 and columns
// below 2^35.
LORA_EXT_HOST_DEVICE PhiloxBlock dropout_counter(uint64_t offset, int64_t row, int64_t block,
                                                 int lane) {
  const uint64_t row_bits = static_cast<uint64_t>(row);
  return {{static_cast<uint32_t>(block * kDropoutLanes + lane), static_cast<uint32_t>(row_bits),
           static_cast<uint32_t>(row_bits >> 32) | static_cast<uint32_t>(offset >> 32) << 16,
           static_cast<uint32_t>(offset)}};
}

// The bits of the 8 decisions of one lane.
LORA_EXT_HOST_DEVICE PhiloxBlock dropout_bits(DropoutRng rng, int64_t row, int64_t block,
                                              int lane) {
  return philox(dropout_counter(rng.offset, row, block, lane), static_cast<uint32_t>(rng.seed),
                static_cast<uint32_t>(rng.seed >> 32));
}

// One of the 8 decisions in these bits.
LORA_EXT_HOST_DEVICE bool keeps(const PhiloxBlock& bits, int slot, uint32_t threshold) {
  return (word_of(bits, slot / 2) >> (slot % 2 * 16) & 0xFFFFu) < threshold;
}

LORA_EXT_HOST_DEVICE bool dropout_keep(DropoutRng rng, int64_t row, int64_t column,
                                       uint32_t threshold) {
  const int64_t block = column / kDropoutBlock;
  const int lane = static_cast<int>(column % kDropoutLanes);
  const int slot = static_cast<int>(column % kDropoutBlock) / kDropoutLanes;
  return keeps(dropout_bits(rng, row, block, lane), slot, threshold);
}

}  // namespace lora_ext
