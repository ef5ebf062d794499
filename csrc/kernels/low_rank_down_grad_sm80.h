// dA = dh^T dropout(x) from one pass over x. A block has kColumns columns of x and a range of rows;
// each warp sums its columns for all of the rank in registers. The ranges of rows are added in a
// fixed order afterwards.
#pragma once

#include "drop_tile.h"
#include "low_rank_down_sm80.h"

namespace lora_ext::sm80 {

template <class T>
struct DownGradParams {
  Matrix<T> x;       // [M, K]
  Split<T> dh;       // [M, rank]
  int rank, stride;  // of dA
  bool aligned;      // x is
  Dropout dropout;
  KeptBits kept;       // for its decisions; or none
  int rows_per_block;  // a multiple of 64
  float* dA;           // [row blocks] parts of [rank, K], `stride` * K apart
};

template <int kRank>
struct DownGradShape {
  static constexpr int kM = 64, kK = 128, kThreads = 128, kRing = 2;
  static constexpr int kWarpColumns = kK / 4;
  using TileX = Tile<kM, kK>;
  using TileDh = Tile<kM, kRank>;
  static constexpr int kStageBytes = TileX::kBytes + 2 * TileDh::kBytes;
  static constexpr int kSharedBytes = kRing * kStageBytes;
};

// The sums of `count` rows from first_row on and of a block of columns, store(row of dA, column,
// sum) each.
template <class T, int kRank, class Rows, class Store>
LORA_EXT_DEVICE void down_grad_tile(const DownGradParams<T>& params, const Rows& rows,
                                    int64_t first_row, int64_t count, int64_t column_block,
                                    uint8_t* shared, const Store& store) {
  using Shape = DownGradShape<kRank>;
  using TileX = typename Shape::TileX;
  using TileDh = typename Shape::TileDh;
  constexpr int kSlots = Shape::kWarpColumns / 16;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t K = params.x.columns, first_column = column_block * Shape::kK;
  const int steps = static_cast<int>((count + Shape::kM - 1) / Shape::kM);
  const auto load = [&](int step) {
    uint8_t* stage = shared + step % Shape::kRing * Shape::kStageBytes;
    const int64_t m = first_row + step * Shape::kM;
    rows.template load<TileX, 128>(stage, params.x, params.aligned, m, first_column, thread);
    load_split<TileDh, 128>(arch::shared_address(stage + TileX::kBytes), params.dh, m, 0, thread);
  };

  Draw draw;
  if (params.dropout.enabled) draw = Draw(params.dropout);
  arch::FragmentC sums[kRank / 16][kSlots * 2] = {};
  load(0);
  arch::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int64_t m = first_row + step * Shape::kM;
    arch::cp_async_wait<0>();
    __syncthreads();  // the stage has arrived; everyone is done with the other one
    if (step + 1 < steps) load(step + 1);
    arch::cp_async_commit();
    if (params.dropout.enabled) {
      uint8_t* const x = shared + step % Shape::kRing * Shape::kStageBytes;
      const DropPlace own(thread);
      const auto number = [&](int row, int further) { return rows.number(m + row + further); };
      drop_rows<!Rows::kListed>(
          draw, own, number, column_block, params.kept, [&](int next, int slot) {
            const int place =
                TileX::offset(own.row + next * DropPlace::kNextRow, slot * 2 + own.quarter / 2);
            return reinterpret_cast<FourColumns*>(x + place + own.quarter % 2 * 8);
          });
      __syncthreads();
    }
    const uint32_t stage = arch::shared_address(shared + step % Shape::kRing * Shape::kStageBytes);
    const uint32_t dh_tiles = stage + TileX::kBytes;
#pragma unroll
    for (int k = 0; k < Shape::kM; k += 16) {
      arch::FragmentB b[kSlots][2];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        load_b_rows<TileX>(b[s], stage, k, warp * Shape::kWarpColumns + s * 16, lane);
      }
#pragma unroll
      for (int i = 0; i < kRank / 16; ++i) {
        if (Rows::kListed && i * 16 >= params.rank) break;
#pragma unroll
        for (int term = 0; term < (params.dh.remainder ? 2 : 1); ++term) {
          arch::FragmentA a;
          load_a_transposed<TileDh>(a, dh_tiles + term * TileDh::kBytes, i * 16, k, lane);
#pragma unroll
          for (int j = 0; j < kSlots * 2; ++j) {
            arch::mma_m16n8k16<T>(sums[i][j], a, b[j / 2][j % 2]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRank / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kSlots * 2; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + e / 2 * 8 + lane / 4;
        const int64_t column =
            first_column + warp * Shape::kWarpColumns + j * 8 + lane % 4 * 2 + e % 2;
        if (row < params.rank && column < K) store(row, column, sums[i][j][e]);
      }
    }
  }
}

template <class T, int kRank>
__global__ void __launch_bounds__(128, kLeastBlocks)
    low_rank_down_grad_sm80_kernel(const __grid_constant__ DownGradParams<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int64_t M = params.x.rows, K = params.x.columns;
  const int64_t first_row = int64_t{blockIdx.y} * params.rows_per_block;
  const int64_t rows =
      M - first_row < params.rows_per_block ? M - first_row : params.rows_per_block;
  float* const out = params.dA + int64_t{blockIdx.y} * params.stride * K;
  down_grad_tile<T, kRank>(
      params, NeighbouringRows{}, first_row, rows, blockIdx.x, shared,
      [&](int row, int64_t column, float sum) { out[row * K + column] = sum; });
}

}  // namespace lora_ext::sm80
