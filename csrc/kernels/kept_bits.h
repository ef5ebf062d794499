// Dropout's decisions about x [M, K], a bit an element: the pass over x that makes dA leaves them
// for the product that makes dx, which then draws nothing. They are scratch of one backward call.
//
// A block of decisions (dropout.h) in 128 rows lies together, 16 bytes a row: a word for each
// quarter of the 16 lanes, in the order 0, 2, 1, 3. A thread that has sums as tensor cores deal
// them out asks for lanes 2t, 2t + 1, 2t + 8 and 2t + 9, of quarters t / 2 and t / 2 + 2, which are
// neighbours.
#pragma once

#include "elementwise.h"
#include "lora_linear.h"

namespace lora_ext {

struct KeptBits {
  static constexpr int kRows = 128, kQuarters = 4;

  uint32_t* data;  // null: there are none
  int64_t blocks;  // of decisions beside each other

  // With as many rows and blocks as tiles of 128 x 256 ask for, two of them one below the other:
  // so nobody asks where the matrix ends.
  static KeptBits allocate(int64_t M, int64_t K, const Allocator& scratch) {
    const int64_t rows = round_up(M, 2 * kRows), columns = round_up(K, 2 * kDropoutBlock);
    return {scratch.get<uint32_t>(rows * columns / 32), columns / kDropoutBlock};
  }

  // The words of a row in a block.
  LORA_EXT_DEVICE uint32_t* at(int64_t row, int64_t block) const {
    const int64_t tile = row / kRows * blocks + block;
    return data + (tile * kRows + row % kRows) * kQuarters;
  }
};

LORA_EXT_HOST_DEVICE int place_of_quarter(int quarter) { return quarter % 2 * 2 + quarter / 2; }

// In the word of a quarter, the bits of the lanes 2 * pair and 2 * pair + 1 of it, in a slot: as
// far apart as the columns that they decide about are in a register.
LORA_EXT_HOST_DEVICE uint32_t kept_pair(int pair, int slot) {
  return 0x00010001u << (pair * kDropoutSlots + slot);
}

// What a thread of tensor cores asks for of a row in a block.
struct alignas(8) KeptLanes {
  uint32_t quarters[2];

  // `words` of a row from KeptBits::at, of which the thread asks for the row `further` in its 128.
  LORA_EXT_DEVICE static KeptLanes load(const uint32_t* words, int further, int lane) {
    const uint32_t* own = words + further * KeptBits::kQuarters + lane % 4 / 2 * 2;
    return *reinterpret_cast<const KeptLanes*>(own);
  }

  // A byte for each of its four lanes, a bit for each slot.
  LORA_EXT_DEVICE uint32_t bytes(int lane) const {
    const auto odd = static_cast<uint32_t>(lane % 2);
    return arch::permute_bytes(quarters[0], quarters[1], 0x6420u + odd * 0x1111u);
  }
};

}  // namespace lora_ext
