// Dropout of a tile of x in shared memory, in place, before tensor cores read it.
#pragma once

#include "kept_bits.h"

namespace lora_ext {

// What a thread draws with, the same for all of its tiles.
struct Draw {
  PhiloxKeys keys;
  uint64_t offset;
  uint32_t threshold, minus;  // less than 2^16, and what to add to subtract it, in both halves

  LORA_EXT_DEVICE Draw() {}
  // Of dropout that drops.
  LORA_EXT_DEVICE explicit Draw(const Dropout& dropout) {
    const DropoutRng rng = dropout.rng();
    auto key0 = static_cast<uint32_t>(rng.seed), key1 = static_cast<uint32_t>(rng.seed >> 32);
#pragma unroll
    for (auto& round : keys.round) {
      round[0] = key0, round[1] = key1;
      key0 = arch::add_once(key0, kPhiloxKeyStep0), key1 = arch::add_once(key1, kPhiloxKeyStep1);
    }
    offset = rng.offset;
    threshold = dropout.threshold * 0x10001u;
    minus = ((0x10000u - dropout.threshold) & 0xFFFFu) * 0x10001u;
  }

  LORA_EXT_DEVICE PhiloxBlock bits(int64_t row, int64_t block, int lane) const {
    return philox(dropout_counter(offset, row, block, lane), keys);
  }

  // Two decisions of a word (see keeps()) as signs of its halves: whether a half is below the
  // threshold, that is, whether subtracting it has to borrow.
  LORA_EXT_DEVICE uint32_t kept_signs(uint32_t word) const {
    const uint32_t difference = arch::add_halves(word, minus);
    return (~word & threshold) | ((~word | threshold) & difference);
  }
};

// Of a tile of 64 rows and a block of columns, each of 128 threads has a quarter of the lanes in
// two rows: of every 16 columns four neighbours, 8 bytes. 16 threads have 8 rows of 16 bytes.
struct DropPlace {
  int row, quarter;  // the other row is kNextRow further
  static constexpr int kNextRow = 32;

  LORA_EXT_DEVICE explicit DropPlace(int thread)
      : row(thread / 32 * 8 + thread % 16 / 2), quarter(thread % 32 / 16 * 2 + thread % 2) {}
};

struct alignas(8) FourColumns {
  uint32_t pair[2];
};

// Zeroes what dropout drops; number(row, further) is the number in the call of the tile's row, so
// many further on, and columns(next, slot) points to those of `own` in its first or next row. Its
// decisions go to `kept`, where kLeavesBits, unless that is none. Four Philox calls decide about
// all of a row's columns, and what they have of the column alone is computed once for both rows.
template <bool kLeavesBits, class Number, class Columns>
LORA_EXT_DEVICE void drop_rows(const Draw& draw, const DropPlace& own, const Number& number,
                               int64_t block, const KeptBits& kept, const Columns& columns) {
#pragma unroll
  for (int next = 0; next < 2; ++next) {
    const int64_t own_row = number(own.row, next * DropPlace::kNextRow);
    FourColumns masks[kDropoutSlots];
    [[maybe_unused]] uint32_t bits = 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int lane = own.quarter * 4 + pair * 2;
      const PhiloxBlock first = draw.bits(own_row, block, lane);
      const PhiloxBlock second = draw.bits(own_row, block, lane + 1);
#pragma unroll
      for (int slot = 0; slot < kDropoutSlots; ++slot) {
        const uint32_t digits = slot % 2 == 0 ? 0xDD99u : 0xFFBBu;  // of the low or high halves
        masks[slot].pair[pair] =
            arch::permute_bytes(draw.kept_signs(word_of(first, slot / 2)),
                                draw.kept_signs(word_of(second, slot / 2)), digits);
        if constexpr (kLeavesBits) bits |= masks[slot].pair[pair] & kept_pair(pair, slot);
      }
    }
#pragma unroll
    for (int slot = 0; slot < kDropoutSlots; ++slot) {
      FourColumns* const values = columns(next, slot);
      const FourColumns all = *values;
      *values = {{all.pair[0] & masks[slot].pair[0], all.pair[1] & masks[slot].pair[1]}};
    }
    if constexpr (kLeavesBits) {
      if (kept.data) kept.at(own_row, block)[place_of_quarter(own.quarter)] = bits;
    }
  }
}

// Of neighbouring rows, from `row` on.
template <bool kLeavesBits, class Columns>
LORA_EXT_DEVICE void drop_tile(const Draw& draw, const DropPlace& own, int64_t row, int64_t block,
                               const KeptBits& kept, const Columns& columns) {
  const auto number = [row](int in_tile, int further) { return row + in_tile + further; };
  drop_rows<kLeavesBits>(draw, own, number, block, kept, columns);
}

}  // namespace lora_ext
