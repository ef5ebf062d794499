// What becomes of the sums of a tile, steps that every product of sm_90a has: what dropout drops
// becomes zero, the bias is added, and they go to memory.
//
// A warp has 16 rows of the tile. Of its sums, lane l holds row l / 4 and row l / 4 + 8, and of
// every 8 columns 2 * (l % 4) and the next: sums[column / 8 * 4 + row / 8 * 2 + column % 2].
#pragma once

#include "lora_linear_passes.h"
#include "ring_sm90.h"

namespace lora_ext::sm90 {

// Zeroes what dropout drops; (row, column) is this thread's first row and the tile's first column.
// One Philox call decides for up to eight columns, 16 apart.
template <int kSums>
LORA_EXT_DEVICE void drop(float (&sums)[kSums], const Dropout& dropout, int64_t row, int64_t column,
                          int lane) {
  constexpr int kColumns = kSums * 2;
  constexpr int kWidth = kColumns < kDropoutBlock ? kColumns : kDropoutBlock;
  const DropoutRng rng = dropout.rng();
  const int first_slot = static_cast<int>(column % kDropoutBlock) / kDropoutLanes;
#pragma unroll
  for (int block = 0; block < kColumns / kWidth; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // columns 2t, 2t + 1, 2t + 8, 2t + 9 of every 16
        const PhiloxBlock bits = dropout_bits(rng, row + half * 8, column / kDropoutBlock + block,
                                              lane % 4 * 2 + c % 2 + c / 2 * 8);
#pragma unroll
        for (int i = 0; i < kWidth / kDropoutLanes; ++i) {
          const int slot = kWidth == kDropoutBlock ? i : first_slot + i;
          const int eight = (block * kDropoutSlots + i) * 2 + c / 2;  // columns of the tile
          if (!keeps(bits, slot, dropout.threshold)) sums[eight * 4 + half * 2 + c % 2] = 0.0f;
        }
      }
    }
  }
}

// Decisions about a thread's sums of a tile of so many columns.
template <int kColumns>
struct TileBits {
  static constexpr int kWidth = kColumns < kDropoutBlock ? kColumns : kDropoutBlock;
  static constexpr int kBlocks = kColumns / kWidth;
  KeptLanes lanes[kBlocks][2];  // of its two rows

  LORA_EXT_DEVICE void load(const KeptBits& kept, int64_t row, int64_t column, int lane) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint32_t* const words = kept.at(row, column / kDropoutBlock + block);
      lanes[block][0] = KeptLanes::load(words, 0, lane);
      lanes[block][1] = KeptLanes::load(words, 8, lane);
    }
  }
};

// Zeroes what was dropped, by what another pass has decided; `column` is the tile's first.
template <int kSums>
LORA_EXT_DEVICE void drop(float (&sums)[kSums], const TileBits<kSums * 2>& bits, int64_t column,
                          int lane) {
  using Bits = TileBits<kSums * 2>;
  const int first_slot = static_cast<int>(column % kDropoutBlock) / kDropoutLanes;
#pragma unroll
  for (int block = 0; block < Bits::kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bytes = bits.lanes[block][half].bytes(lane) >> first_slot;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int slot = 0; slot < Bits::kWidth / kDropoutLanes; ++slot) {
          const int eight = (block * kDropoutSlots + slot) * 2 + c / 2;
          if (!(bytes >> (c * 8 + slot) & 1u)) sums[eight * 4 + half * 2 + c % 2] = 0.0f;
        }
      }
    }
  }
}

// bias [N], 8-byte aligned, N a multiple of 8; `column` is the tile's first. A warp's lanes are all
// inside of the matrix or all outside.
template <int kSums>
LORA_EXT_DEVICE void add_bias(float (&sums)[kSums], const float* bias, int64_t column, int64_t N,
                              int lane) {
  struct alignas(8) Pair {
    float first, second;
  };
  const auto* own = reinterpret_cast<const Pair*>(bias + column + lane % 4 * 2);
  const int left = N - column < kSums * 2 ? static_cast<int>(N - column) : kSums * 2;
  constexpr int kAtOnce = kSums / 4 < 16 ? kSums / 4 : 16;  // loads, before the first is needed
#pragma unroll
  for (int eights = 0; eights < kSums / 4; eights += kAtOnce) {
    Pair pairs[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if ((eights + i) * 8 < left) pairs[i] = own[(eights + i) * 4];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float* sum = sums + (eights + i) * 4;
      sum[0] += pairs[i].first, sum[1] += pairs[i].second;
      sum[2] += pairs[i].first, sum[3] += pairs[i].second;
    }
  }
}

// Shared memory through which a warp stores a tile of so many columns: boxes of 16 rows and 64
// columns that are used in turn, so that one is filled while TMA reads the other.
template <int kColumns>
struct StoreBoxes {
  static constexpr int kRows = 16, kWidth = kRowBytes / 2;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kCount = kColumns > kWidth ? 2 : 1;
  static constexpr int kWarpBytes = kCount * kBytes;
  static_assert(kColumns / kWidth % kCount == 0, "each tile begins with the same box");
};

// Rounds and stores; `boxes` is this warp's shared memory, (row, column) the first of its part of
// the tile. Before the kernel ends, lane 0 waits until all is read.
template <class T, int kSums>
LORA_EXT_DEVICE void store(const float (&sums)[kSums], const arch::TensorMap& out, uint32_t boxes,
                           int64_t row, int64_t column, int lane) {
  using Boxes = StoreBoxes<kSums * 2>;
  // Of stmatrix: the left and right halves of 16 columns, whose chunks of 16 bytes are swizzled.
  const auto own = static_cast<uint32_t>(lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16);
#pragma unroll
  for (int box = 0; box < kSums * 2 / Boxes::kWidth; ++box) {
    const uint32_t shared = boxes + static_cast<uint32_t>(box % Boxes::kCount * Boxes::kBytes);
    if (lane == 0) arch::tma_store_wait_read<Boxes::kCount - 1>();
    __syncwarp();
#pragma unroll
    for (int sixteen = 0; sixteen < Boxes::kWidth / 16; ++sixteen) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows 0 to 7, 8 to 15, and the same 8 columns further
        const int eight = box * 8 + sixteen * 2 + i / 2;
        const int sum = eight * 4 + i % 2 * 2;
        pairs[i] = pack_pair<T>(sums[sum], sums[sum + 1]);
      }
      arch::stmatrix_x4(shared + (own ^ static_cast<uint32_t>(sixteen * 32)), pairs);
    }
    arch::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      arch::tma_store_2d(out, shared, static_cast<int>(column) + box * Boxes::kWidth,
                         static_cast<int>(row));
      arch::tma_store_commit();
    }
  }
}

}  // namespace lora_ext::sm90
