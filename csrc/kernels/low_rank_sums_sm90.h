// How the low-rank passes for sm_90a add what blocks of a cluster have summed: each block puts its
// sums into its own shared memory, reads its share of them in all blocks in their order, and stores
// the result. Nothing of it goes through global memory, and no kernel has to follow.
#pragma once

#include "low_rank_tile_sm90.h"

namespace lora_ext::sm90 {

constexpr int kMostBlocks = 8;  // of a cluster, of any GPU that has clusters

template <class T, class Shape>
struct LowRankSums {
  using Sums = typename LowRankTile<T, Shape>::Sums;
  static constexpr int kThreads = Shape::kMultipliers * kWarpgroup;
  // The sums of a tile, of 128 rows: four of a thread at a time, in the order of the threads. So
  // shared memory is stored and read without conflicts, and other blocks' in whole lines.
  static constexpr int kUnits = Shape::kN / 8 * kThreads, kBytes = kUnits * 16;
  static_assert(kBytes == 128 * Shape::kN * 4);
  static constexpr int kAtOnce = 4;  // reads of a thread: more registers are not free

  struct alignas(16) Unit {
    float sum[4];
  };

  uint8_t* shared;
  uint32_t address;   // of it
  uint32_t barriers;  // two mbarriers: sums can be read, sums have been read
  Cluster cluster;
  int blocks;  // that add: all of the cluster, or this one alone
  int thread;  // of those that multiply
  uint32_t parity = 0;

  // Which of the blocks that add this one is, and which of the cluster the first of them is.
  LORA_EXT_DEVICE int rank() const { return blocks > 1 ? cluster.rank : 0; }
  LORA_EXT_DEVICE int first_block() const { return blocks > 1 ? 0 : cluster.rank; }

  LORA_EXT_DEVICE void initialise() const {
    for (uint32_t i = 0; i < 2; ++i) {
      arch::mbarrier_init(barriers + 8 * i, static_cast<uint32_t>(kThreads / 32 * blocks));
    }
  }

  // A tile's sums to `offset` of shared memory, which nobody reads any more.
  LORA_EXT_DEVICE void put(const Sums& sums, int offset) const {
    auto* const units = reinterpret_cast<Unit*>(shared + offset) + thread;
#pragma unroll
    for (int i = 0; i < Shape::kN / 8; ++i) {
      units[i * kThreads] = {{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]}};
    }
  }

  // Waits until all threads of all blocks have put their sums.
  LORA_EXT_DEVICE void publish() const { meet(barriers); }

  // Waits until all of them have read what they need: what was put may be overwritten, and the
  // block may end.
  LORA_EXT_DEVICE void retire() {
    meet(barriers + 8);
    parity ^= 1;
  }

  // f(unit, sums) for this thread's part of the share of its block, of `tiles` tiles; which begin
  // at `offset` in all blocks but the last.
  template <class F>
  LORA_EXT_DEVICE void add(int offset, int offset_in_last, int tiles, const F& f) const {
    const int units = tiles * kUnits;
    const int last = units * (rank() + 1) / blocks;
    for (int unit = units * rank() / blocks + thread; unit < last; unit += kThreads) {
      const uint32_t from = address + static_cast<uint32_t>(unit * 16);
      Unit all{};
#pragma unroll 1
      for (int first = 0; first < blocks; first += kAtOnce) {
        arch::Words words[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= blocks) continue;
          const int from_block = first_block() + first + i;
          const int begin = first + i + 1 < blocks ? offset : offset_in_last;
          words[i] = arch::cluster_load_16(
              arch::cluster_address(from + static_cast<uint32_t>(begin), from_block));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= blocks) continue;
#pragma unroll
          for (int k = 0; k < 4; ++k) all.sum[k] += bits_to_float(words[i].word[k]);
        }
      }
      f(unit, all);
    }
  }

  // Of a unit of a tile: the first two sums are neighbours at this row and column, the others eight
  // rows below.
  LORA_EXT_DEVICE static int row_of(int unit) {
    const int of = unit % kThreads;
    return of / kWarpgroup * 64 + of % kWarpgroup / 32 * 16 + of % 32 / 4;
  }
  LORA_EXT_DEVICE static int column_of(int unit) { return unit / kThreads * 8 + unit % 4 * 2; }

 private:
  LORA_EXT_DEVICE void meet(uint32_t barrier) const {
    __syncwarp();
    const int lane = thread % 32;
    if (lane < blocks) {
      arch::mbarrier_arrive_cluster(arch::cluster_address(barrier, first_block() + lane));
    }
    arch::mbarrier_wait_cluster(barrier, parity);
  }
};

}  // namespace lora_ext::sm90
