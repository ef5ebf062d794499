// h = dropout(x) A^T: a product of few columns that reads x once. Each block has kM rows and all
// columns, and a range of k if there are several splits; lora_linear_finish_kernel then adds these
// in a fixed order.
#pragma once

#include "elementwise.h"
#include "product_sm80.h"

namespace lora_ext::sm80 {

template <class T>
struct DownParams {
  Matrix<T> x;   // [M, K]
  Split<T> A;    // [rank, K]
  bool aligned;  // x is
  Dropout dropout;
  int splits;  // blocks along K
  int rank, stride;
  float* partial;  // [splits, M, rank], rows `stride` apart
};

template <int kColumns>
struct DownShape {
  static constexpr int kM = 64, kN = kColumns, kK = 64;
  static constexpr int kWarpRows = 16, kWarpColumns = kColumns;
  static constexpr int kWarpsM = 4, kWarpsN = 1, kThreads = 128, kRing = 3;
  static constexpr int kStageBytes = (kM + 2 * kN) * kK * 2;
  static constexpr int kSharedBytes = kRing * kStageBytes;
};

// Dropout's decisions about the operands A of one warp (see load_a) in 128 columns. One Philox call
// decides for eight columns, 16 apart: those of one place in the operands of eight steps of k.
struct OperandMask {
  uint32_t keep[2][4];  // [row half][column 2t, 2t + 1, 2t + 8, 2t + 9], a bit per step

  // `rows`: of the call, that of each half that is the lane's
  LORA_EXT_DEVICE void draw(DropoutRng rng, uint32_t threshold, const int64_t (&rows)[2],
                            int64_t block, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const PhiloxBlock bits =
            dropout_bits(rng, rows[half], block, lane % 4 * 2 + c % 2 + c / 2 * 8);
        keep[half][c] = 0;
#pragma unroll
        for (int slot = 0; slot < kDropoutSlots; ++slot) {
          keep[half][c] |= static_cast<uint32_t>(keeps(bits, slot, threshold)) << slot;
        }
      }
    }
  }

  LORA_EXT_DEVICE void apply(arch::FragmentA& a, int slot) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = keep[i % 2][i / 2 * 2] >> slot & 1u;
      const uint32_t second = keep[i % 2][i / 2 * 2 + 1] >> slot & 1u;
      a[i] &= (first ? 0x0000FFFFu : 0u) | (second ? 0xFFFF0000u : 0u);
    }
  }

  // To sums of the same rows, of neighbouring columns from a slot's first one on.
  template <int kColumnTiles>
  LORA_EXT_DEVICE void apply(arch::FragmentC (&sums)[kColumnTiles], int first_slot) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t bits = keep[half][c] >> first_slot;
#pragma unroll
        for (int j = 0; j < kColumnTiles / 2; ++j) {
          if (!(bits >> j & 1u)) sums[2 * j + c / 2][half * 2 + c % 2] = 0.0f;
        }
      }
    }
  }
};

// The sums of the tile of rows from m on, of split blockIdx.y, into `out` [rows of x, rank].
template <class T, int kColumns, class Rows>
LORA_EXT_DEVICE void down_tile(const DownParams<T>& params, const Rows& rows, int64_t m,
                               uint8_t* shared, float* out) {
  using Shape = DownShape<kColumns>;
  using TileX = Tile<Shape::kM, Shape::kK>;
  using TileA = Tile<Shape::kN, Shape::kK>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t steps = (params.x.columns + Shape::kK - 1) / Shape::kK;
  const int64_t first = steps * blockIdx.y / params.splits;
  const int64_t last = steps * (blockIdx.y + 1) / params.splits;

  const auto load = [&](int64_t step) {
    uint8_t* const x = shared + step % Shape::kRing * Shape::kStageBytes;
    const int64_t k = step * Shape::kK;
    rows.template load<TileX, Shape::kThreads>(x, params.x, params.aligned, m, k, thread);
    load_split<TileA, Shape::kThreads>(arch::shared_address(x + TileX::kBytes), params.A, 0, k,
                                       thread);
  };

  const int terms = params.A.remainder ? 2 : 1;
  WarpSums<Shape> sums;
  sums.clear();
  OperandMask mask;
  int64_t masked_block = -1;
#pragma unroll
  for (int s = 0; s < Shape::kRing - 1; ++s) {
    if (first + s < last) load(first + s);
    arch::cp_async_commit();
  }
  for (int64_t step = first; step < last; ++step) {
    arch::cp_async_wait<Shape::kRing - 2>();
    __syncthreads();
    if (step + Shape::kRing - 1 < last) load(step + Shape::kRing - 1);
    arch::cp_async_commit();
    const uint32_t stage = arch::shared_address(shared + step % Shape::kRing * Shape::kStageBytes);
    const int64_t block = step * Shape::kK / kDropoutBlock;
    if (params.dropout.enabled && block != masked_block) {
      const int64_t first_row = m + warp * 16 + lane / 4;
      mask.draw(params.dropout.rng(), params.dropout.threshold,
                {rows.number(first_row), rows.number(first_row + 8)}, block, lane);
      masked_block = block;
    }
#pragma unroll
    for (int k = 0; k < Shape::kK; k += 16) {
      arch::FragmentA a;
      load_a<TileX>(a, stage, warp * 16, k, lane);
      if (params.dropout.enabled) {
        mask.apply(a, static_cast<int>((step * Shape::kK + k) % kDropoutBlock) / kDropoutLanes);
      }
#pragma unroll 1
      for (int term = 0; term < terms; ++term) {
        const uint32_t b_tile = stage + TileX::kBytes + term * TileA::kBytes;
#pragma unroll
        for (int j = 0; j < Shape::kN / 16; ++j) {
          if (Rows::kListed && j * 16 >= params.rank) break;
          arch::FragmentB b[2];
          load_b<TileA>(b, b_tile, k, j * 16, lane);
          arch::mma_m16n8k16<T>(sums.value[0][2 * j], a, b[0]);
          arch::mma_m16n8k16<T>(sums.value[0][2 * j + 1], a, b[1]);
        }
      }
    }
  }

#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t row = m + warp * 16 + e / 2 * 8 + lane / 4;
    if (row >= params.x.rows) continue;
#pragma unroll
    for (int j = 0; j < Shape::kN / 8; ++j) {
      const int column = j * 8 + lane % 4 * 2 + e % 2;
      if (column >= params.rank) continue;
      out[row * params.stride + column] = sums.value[0][j][e];
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(DownShape<kColumns>::kThreads, kLeastBlocks)
    low_rank_down_sm80_kernel(const __grid_constant__ DownParams<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  down_tile<T, kColumns>(params, NeighbouringRows{}, int64_t{blockIdx.x} * DownShape<kColumns>::kM,
                         shared,
                         params.partial + int64_t{blockIdx.y} * params.x.rows * params.stride);
}

}  // namespace lora_ext::sm80
