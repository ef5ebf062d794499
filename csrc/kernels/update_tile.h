// Tiles of W + L R, a low-rank update whose sums exist in registers only: on any GPU, in float, so
// for adapters and bases of every type. A block has 32 rows and 256 columns, a warp 4 of the rows,
// a lane 8 of the columns; ranks come through shared memory, 32 at a time.
#pragma once

#include "span.h"

namespace lora_ext {

LORA_EXT_DEVICE int at_most(int64_t value, int most) {
  return value < most ? static_cast<int>(value) : most;
}

struct UpdateTile {
  static constexpr int kRows = 32, kColumns = kSpan, kRanks = 32;
  static constexpr int kWarpRows = kRows / kRowWarps;
  // Of a rank in shared memory: 4 more than are used, so that neighbouring ranks, which
  // neighbouring lanes write, lie in other banks.
  static constexpr int kLeft = kRows + 4, kRight = kColumns + 4;  // floats
  static constexpr int kSharedBytes = kRanks * (kLeft + kRight) * int{sizeof(float)};
  static_assert(kWarpRows == 4, "one load of the left factor");
  static_assert(kSharedBytes <= 48 * 1024, "two blocks of a multiprocessor, without asking");
  using Sums = float[kWarpRows][kEach];

  struct alignas(16) Four {
    float at[4];
  };

  float *left, *right;  // [kRanks, kLeft], [kRanks, kRight]: of R a lane's elements 0 to 3 lie at
                        // 4 * lane, and 4 to 7 another 128 further

  LORA_EXT_DEVICE explicit UpdateTile(uint8_t* shared)
      : left(reinterpret_cast<float*>(shared)), right(left + kRanks * kLeft) {}

  // Where the span's column lies in a rank of `right`.
  template <class T, bool kAligned>
  LORA_EXT_DEVICE static unsigned place(const Span<T, kAligned>&, unsigned column) {
    if constexpr (!kAligned) return column / 128 * 128 + column % 32 * 4 + column / 32 % 4;
    return sizeof(T) == 2 ? column % 8 / 4 * 128 + column / 8 * 4 + column % 4 : column;
  }

  // out[rank * kStride + place(item)] = value(item, rank) for `ranks` of each item: neighbouring
  // lanes take neighbouring ranks, as they lie in memory. Items beyond the matrix have any finite
  // or infinite value, since nothing is stored that comes of them: so no load has a branch around.
  template <int kItems, int kStride, class Place, class Value>
  LORA_EXT_DEVICE static void fill_by_rank(float* out, int ranks, int thread, const Place& place,
                                           const Value& value) {
    constexpr int kAtOnce = 4;  // loads, before the first is needed
    constexpr bool kWhole = kItems % (kAtOnce * kRowThreads / 8) == 0;  // no turn ends beyond items
    const int width = ranks > 16 ? 32 : ranks > 8 ? 16 : 8, step = kRowThreads / width;
    const int rank = thread % width;
    if (rank >= ranks) return;
    for (int first = thread / width; first < kItems; first += kAtOnce * step) {
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * step;
        values[i] = value(kWhole || item < kItems ? item : kItems - 1, rank);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * step;
        if (kWhole || item < kItems) out[rank * kStride + place(item)] = values[i];
      }
    }
  }

  // Row `rank` of R from `first` on, for `ranks` of them: `row_of(rank)` is the span's first
  // element there.
  template <class Span, class RowOf>
  LORA_EXT_DEVICE void fill_right(const Span& span, int ranks, int thread, const RowOf& row_of) {
    for (int rank = thread / 32; rank < ranks; rank += kRowWarps) {
      float values[kEach];
      span.load(row_of(rank), values);
      float* const out = right + rank * kRight + span.lane * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Four four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.at[i] = values[half * 4 + i];
        *reinterpret_cast<Four*>(out + half * (kColumns / 2)) = four;
      }
    }
  }

  // sums += L R of this warp's rows, for the ranks that are there.
  LORA_EXT_DEVICE void multiply(Sums& sums, int ranks, int warp, int lane) const {
    const float* const own_left = left + warp * kWarpRows;
    const float* const own_right = right + lane * 4;
#pragma unroll 2
    for (int rank = 0; rank < ranks; ++rank) {
      const Four l = *reinterpret_cast<const Four*>(own_left + rank * kLeft);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Four r =
            *reinterpret_cast<const Four*>(own_right + rank * kRight + half * (kColumns / 2));
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][half * 4 + e] += l.at[i] * r.at[e];
        }
      }
    }
  }

  // sums = W + L R of this warp's rows: fill(first, ranks) puts ranks of both factors into shared
  // memory, raw holds W's elements.
  template <class T, class Fill>
  LORA_EXT_DEVICE void add(Sums& sums, const Raw<T> (&raw)[kWarpRows], int rank, int warp, int lane,
                           const Fill& fill) const {
    for (int first = 0; first < rank || first == 0; first += kRanks) {
      const int ranks = at_most(rank - first, kRanks);
      if (first > 0) __syncthreads();  // the ranks before are read
      fill(first, ranks);
      __syncthreads();
      if (first == 0) {  // not before: what is loaded arrives while shared memory is filled
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) widen(raw[i], sums[i]);
      }
      multiply(sums, ranks, warp, lane);
    }
  }
};

}  // namespace lora_ext
