// The sizes of few_rows_sm80.h's kernel, for itself and for its launcher.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "family.h"

namespace lora_ext::sm80 {

// Rows that are there to be multiplied, and blocks that share K. Eight warps: groups that have
// their columns, for each of which others have their part of a step. A warp alone reads all rows of
// x for its part, so one block without others has few groups; and no more sums than registers.
template <int kMostRows, int kBlocks>
struct FewRowsShape {
  static constexpr int kRows = kMostRows, kSplits = kBlocks;
  static constexpr int kGroups = kBlocks > 1 ? 4 : 2, kDepths = 8 / kGroups, kThreads = 256;
  static constexpr int kColumnTiles = kBlocks > 1 ? 6 : 4, kRankTiles = 4;  // of a warp, at most
  static constexpr int kMostColumns = kGroups * kColumnTiles * 8;
  static constexpr int kMostRank = kGroups * kRankTiles * 8;
  static constexpr int kStep = 64;  // of K
  // Steps: what is on its way hides latency.
  static constexpr int kRing = kBlocks > 1 || kMostRows > 32 ? 4 : 6;
  static constexpr int kWeightAt = kRows * kStep * 2;  // bytes of x before it
  static_assert(kStep % (16 * kDepths) == 0);
};

// Of shared memory: a ring of steps, which becomes room for the sums of all warps.
struct FewRowsSizes {
  int A_at, step_bytes;    // in bytes: of a step are x, the weight, lora_A
  int y_stride, h_stride;  // of rows of sums, in floats
  int shared_bytes;
};

template <class TA, class Shape>
constexpr FewRowsSizes few_rows_sizes(int columns, int r) {
  // Odd multiples of 8, so that four rows lie in different banks
  const auto stride = [](int floats) { return floats / 16 * 16 + 8; };
  const auto padded = [](int64_t value, int step) {
    return static_cast<int>(round_up(value, step));
  };
  FewRowsSizes sizes{};
  sizes.A_at = Shape::kWeightAt + columns * Shape::kStep * 2;
  sizes.step_bytes = sizes.A_at + padded(r, 8) * Shape::kStep * static_cast<int>(sizeof(TA));
  sizes.y_stride = stride(columns), sizes.h_stride = stride(padded(r, 8));
  const int sums = Shape::kDepths * Shape::kRows * (sizes.y_stride + sizes.h_stride) * 4;
  constexpr int kReadBeyond = 8 * Shape::kStep * 2;  // rows are read 16 at a time
  sizes.shared_bytes = std::max(Shape::kRing * sizes.step_bytes + kReadBeyond, sums);
  return sizes;
}

// Whether the fewest columns have room, whatever call few_rows_fit lets through.
template <class TA, int kBlocks>
constexpr bool few_rows_have_room(int shared_bytes) {
  constexpr auto kFamily = kBlocks > 1 ? KernelFamily::Sm90 : KernelFamily::Sm80;
  const auto fits = [](int64_t M, int r) {
    return few_rows_fit(M, 1 << 20, r, sizeof(TA) == sizeof(float), false, kFamily);
  };
  bool room = true;
  const auto check = [&](auto shape, int64_t fewest_rows) {
    using Shape = decltype(shape);
    for (int r = 1; fits(fewest_rows, r); ++r) {
      const int bytes = few_rows_sizes<TA, Shape>(8 * kBlocks, r).shared_bytes;
      room &= r <= Shape::kMostRank && bytes <= shared_bytes;
    }
  };
  check(FewRowsShape<16, kBlocks>{}, 1);
  check(FewRowsShape<32, kBlocks>{}, 17);
  check(FewRowsShape<64, kBlocks>{}, 33);
  return room;
}

}  // namespace lora_ext::sm80
