// What the low-rank passes for sm_90a do with one tile of x or dy in shared memory.
#pragma once

#include "drop_tile.h"
#include "lora_linear_passes.h"
#include "ring_sm90.h"

namespace lora_ext::sm90 {

// A block's shared memory: a ring of stages, the tiles of R, then the barriers of both and two for
// sums that blocks share. Those of P take the place of a stage, those of Q the whole of both.
struct LowRankLayout {
  int stages, stage_bytes;  // a tile of X and one of each term of L
  int R_tiles, R_bytes;     // where they begin, and bytes of one: of each term of R
  int barriers, bytes;      // where they begin; of everything
};
constexpr int kRSlots = 2;

// Of a matrix X [M, C], which is x or dy:
//   P [M, rank] = dropout(X) L      h of x with L = lora_A^T; dh of dy with L = lora_B
//   Q [C, rank] = dropout(X)^T R    dB of dy with R = h; dA (transposed) of x with R = dh
// A block has a range of columns and one of rows. Of its sums P is one part of several, a part for
// each range of columns, and Q another. The blocks of a cluster lie along the columns and add P, or
// along the rows and add Q. What they do not add is written as parts.
template <class T>
struct LowRankParams {
  arch::TensorMap X;
  arch::TensorMap L[2], R[2];  // the value and its remainder
  int L_terms, R_terms;        // how many of them there are; 0 where P or Q is not wanted
  int64_t M, C;
  int rank;
  int row_tiles, column_tiles;  // of a block
  LowRankLayout layout;
  Dropout dropout;
  KeptBits kept;    // of dropout(X), by a kernel that makes Q; or none
  bool along_rows;  // blockIdx.x counts ranges of rows, which are else those of columns
  bool adds_P, adds_Q;
  int adders;            // blocks that add: all of a cluster, or each for itself
  Hidden<T> hidden;      // if it adds P
  int hidden_column;     // where the columns of P begin
  Gradient<T> gradient;  // if it adds Q; laid out as Q
  float* P;              // [column blocks, M, rank], rows P_stride apart
  float* Q;              // [row blocks] parts, Q_part apart, of [C, rank]
  int64_t P_stride, Q_row, Q_column, Q_part;  // Q's rows and columns are so far apart
  arch::WaitReport* report;
};

constexpr int kMostRank = 128, kMostRankOfBoth = 64;  // of a kernel that makes P or Q, or both

// Of a block that makes Q, whose sums stay in registers.
constexpr int most_column_tiles(int64_t rank) { return rank > kMostRankOfBoth ? 2 : 4; }

// A tile of X is two boxes of 64 columns. Its columns are one block of dropout's decisions.
template <int kRank, bool kWithP, bool kWithQ, Major kMajorOfL>
struct LowRankShape {
  static constexpr int kN = kRank, kRows = 128, kColumns = 128, kBoxes = 2;
  static constexpr Major kMajorL = kMajorOfL;
  static constexpr bool kP = kWithP, kQ = kWithQ;
  static constexpr bool kDrops = kMajorL == Major::kK || !kP;  // what makes h or dA; dy never is
  static constexpr int kMostColumnTiles = most_column_tiles(kN);
  static_assert(kN <= kMostRankOfBoth || (kN <= kMostRank && !(kP && kQ)));
  static constexpr int kMultipliers = 2;
  static constexpr int kThreads = (1 + kMultipliers) * kWarpgroup;
  static constexpr int kBoxBytes = kRows * kRowBytes, kXBytes = kBoxes * kBoxBytes;
  static constexpr int kLBytes = kColumns * kN * 2, kRBytes = kRows * kN * 2;  // of one term
  // R, and L where it lies by the columns of X, are boxes of up to 64 ranks, whose rows of 128 are
  // as long as a span of their swizzle.
  static constexpr int kRankBox = kN < 64 ? kN : 64, kRankBoxes = kN / kRankBox;
  static constexpr int kRankBoxBytes = 128 * kRankBox * 2;
  static constexpr Swizzle kSwizzle =
      kN == 16 ? Swizzle::k32 : (kN == 32 ? Swizzle::k64 : Swizzle::k128);
  static_assert(arch::swizzle_bytes(kSwizzle) == kRankBox * 2);
  static_assert(kRows == 128 && kColumns == 128);
  static_assert(kColumns == kDropoutBlock, "one Philox call is used up within a tile");
  static_assert(2 * (kXBytes + (kP ? 2 * kLBytes : 0)) + (kQ ? kRSlots * 2 * kRBytes : 0) + 1024 <=
                    kMostSharedBytes,
                "two stages always fit: one is multiplied while dropout is done to the next");
  static_assert(kLBytes % 1024 == 0, "swizzled tiles begin at multiples of 1024 bytes");
};

template <class T, class Shape>
struct LowRankTile {
  using Sums = float[Shape::kN / 2];  // of a thread: 64 rows of a warpgroup

  // Zeroes what dropout drops in 64 rows from `row`, which begin at `x`; of Q the decisions may
  // have to be left in `kept`. 16 threads access 16 times 8 bytes in different banks.
  LORA_EXT_DEVICE static void drop(uint8_t* x, const Draw& draw, int64_t row, int64_t block,
                                   const KeptBits& kept, int thread) {
    const DropPlace own(thread);
    const uint32_t first =
        arch::swizzled(static_cast<uint32_t>(own.row * kRowBytes + own.quarter * 8), Swizzle::k128);
    drop_tile<Shape::kQ>(draw, own, row, block, kept, [&](int next, int slot) {
      const int tile = slot / 4 * Shape::kBoxBytes + next * DropPlace::kNextRow * kRowBytes;
      return reinterpret_cast<FourColumns*>(x + tile +
                                            (first ^ static_cast<uint32_t>(slot % 4 * 32)));
    });
  }

  // ---- Products --------------------------------------------------------------------------------

  // The operand of which the rank is contiguous, rows of so many bytes.
  static constexpr int kRankRowBytes = Shape::kRankBox * 2;
  LORA_EXT_DEVICE static uint64_t rank_major(uint32_t tile) {
    return arch::wgmma_descriptor(tile, Shape::kRankBoxBytes, 8 * kRankRowBytes, Shape::kSwizzle);
  }

  // p (+)= 64 rows of X, which begin at `x`, times L.
  LORA_EXT_DEVICE static void multiply_p(Sums& p, uint32_t x, uint32_t l, bool accumulate) {
    constexpr bool kByRanks = Shape::kMajorL == Major::kMN;
    const uint64_t of_x = arch::wgmma_descriptor(x, 16, 8 * kRowBytes, Swizzle::k128);
    const uint64_t of_l =
        kByRanks ? rank_major(l) : arch::wgmma_descriptor(l, 16, 8 * kRowBytes, Swizzle::k128);
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kColumns; k += 16) {
      const int box = k / 64, k_bytes = k % 64 * 2;
      const uint64_t a = arch::further(of_x, box * Shape::kBoxBytes + k_bytes);
      const uint64_t b =
          arch::further(of_l, kByRanks ? k * kRankRowBytes : box * Shape::kN * kRowBytes + k_bytes);
      arch::wgmma<T, Shape::kN, Major::kK, Shape::kMajorL>(p, a, b, accumulate || k > 0);
    }
    arch::wgmma_commit();
  }

  // q (+)= 64 columns of X, those of the box at `x`, times R.
  LORA_EXT_DEVICE static void multiply_q(Sums& q, uint32_t x, uint32_t r, bool accumulate) {
    const uint64_t of_x = arch::wgmma_descriptor(x, 16, 8 * kRowBytes, Swizzle::k128);
    const uint64_t of_r = rank_major(r);
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kRows; k += 16) {
      arch::wgmma<T, Shape::kN, Major::kMN, Major::kMN>(q, arch::further(of_x, k * kRowBytes),
                                                        arch::further(of_r, k * kRankRowBytes),
                                                        accumulate || k > 0);
    }
    arch::wgmma_commit();
  }

  // ---- Results ---------------------------------------------------------------------------------

  // Stores the rows from `row`, this thread's first one, of a matrix [rows, rank] whose elements
  // are so far apart.
  LORA_EXT_DEVICE static void store(const Sums& sums, float* out, int64_t row, int64_t rows,
                                    int rank, int64_t row_step, int64_t column_step, int lane) {
    const bool pairs = column_step == 1 && row_step % 2 == 0;  // then the rank is even, too
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= rows) continue;
      float* const begin = out + (row + half * 8) * row_step;
#pragma unroll
      for (int i = 0; i < Shape::kN / 8; ++i) {
        const int column = i * 8 + lane % 4 * 2;
        const float first = sums[i * 4 + half * 2], second = sums[i * 4 + half * 2 + 1];
        if (pairs) {
          if (column < rank) *reinterpret_cast<Pair*>(begin + column) = {first, second};
        } else {
          if (column < rank) begin[column * column_step] = first;
          if (column + 1 < rank) begin[(column + 1) * column_step] = second;
        }
      }
    }
  }

 private:
  struct alignas(8) Pair {
    float first, second;
  };
};

}  // namespace lora_ext::sm90
