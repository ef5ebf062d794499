// dh = dy B and dB = dy^T h from one pass over dy. A block has a range of rows and a range of
// columns of dy: the tile in shared memory is operand A of dh's product, and transposed of dB's. dh
// of a tile of rows stays in registers while the block walks along its columns; dB of the columns
// is summed in shared memory. What blocks share is written as parts and added in a fixed order
// afterwards.
#pragma once

#include "tile_sm80.h"

namespace lora_ext::sm80 {

template <class T>
struct UpGradParams {
  Matrix<T> dy;           // [M, N]
  Split<T> B;             // [N, rank]
  int rank, stride;       // of dh and dB, rows are `stride` apart
  Split<T> h;             // [M, rank]; data null if dB is not wanted
  bool aligned;           // dy is
  int rows_per_block;     // a multiple of 64
  int columns_per_block;  // a multiple of 64
  float* dh;              // [column blocks, M, rank]: parts; or null
  float* dB;              // [row blocks, N, rank]: parts; or null
};

// Columns of dy for a block, at most: wide blocks make few parts of dh.
constexpr int kMostUpGradColumns = 256;

template <int kRank>
struct UpGradShape {
  static constexpr int kM = 64, kN = 64, kThreads = 128, kRing = 2;
  using TileDy = Tile<kM, kN>;
  using TileB = Tile<kN, kRank>;
  using TileH = Tile<kM, kRank>;
  static constexpr int kStageBytes = TileDy::kBytes + 2 * TileB::kBytes;
  static constexpr int kHBytes = 2 * TileH::kBytes;  // of a tile of rows
  static constexpr int kSumsOffset = kRing * kStageBytes + 2 * kHBytes;
  static constexpr int shared_bytes(int columns_per_block) {
    return kSumsOffset + columns_per_block * kRank * 4;
  }
};
// Which up_grad relies on: 32 ranks fit on every GPU from sm_80 on.
static_assert(UpGradShape<32>::shared_bytes(kMostUpGradColumns) <= kLeastSharedBytes);

// Of `count` rows from first_row on, and of the columns from first_column on: dh of each row into
// `out_dh` [rows of dy, rank], unless that is null, and dB by store(column of dy, rank, sum), if it
// is wanted.
template <class T, int kRank, class Rows, class Store>
LORA_EXT_DEVICE void up_grad_tile(const UpGradParams<T>& params, const Rows& rows,
                                  int64_t first_row, int64_t count, int64_t first_column,
                                  uint8_t* shared, float* out_dh, bool wants_dB,
                                  const Store& store) {
  using Shape = UpGradShape<kRank>;
  using TileDy = typename Shape::TileDy;
  using TileB = typename Shape::TileB;
  using TileH = typename Shape::TileH;
  constexpr int kColumnTiles = kRank / 8;
  auto* const dB_sums = reinterpret_cast<float*>(shared + Shape::kSumsOffset);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t M = params.dy.rows, N = params.dy.columns;
  const int64_t columns =
      N - first_column < params.columns_per_block ? N - first_column : params.columns_per_block;
  const int row_tiles = static_cast<int>((count + Shape::kM - 1) / Shape::kM);
  const int column_tiles = static_cast<int>((columns + Shape::kN - 1) / Shape::kN);
  const int steps = row_tiles * column_tiles;

  const auto h_tile = [&](int step) {  // two, for tiles of rows in turn
    const int turn = step / column_tiles % 2;
    return shared + Shape::kRing * Shape::kStageBytes + turn * Shape::kHBytes;
  };

  // Step by step along the columns of one tile of rows after another.
  const auto load = [&](int step) {
    uint8_t* stage = shared + step % Shape::kRing * Shape::kStageBytes;
    const int64_t m = first_row + step / column_tiles * Shape::kM;
    const int64_t n = first_column + step % column_tiles * Shape::kN;
    rows.template load<TileDy, 128>(stage, params.dy, params.aligned, m, n, thread);
    load_split<TileB, 128>(arch::shared_address(stage + TileDy::kBytes), params.B, n, 0, thread);
    if (params.h.value.data && step % column_tiles == 0) {
      load_split<TileH, 128>(arch::shared_address(h_tile(step)), params.h, m, 0, thread);
    }
  };

  for (int i = thread; i < params.columns_per_block * kRank; i += 128) dB_sums[i] = 0.0f;
  arch::FragmentC dh[kColumnTiles];
  load(0);
  arch::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int row_tile = step / column_tiles, column_tile = step % column_tiles;
    arch::cp_async_wait<0>();
    __syncthreads();  // the stage has arrived; everyone is done with the other one
    if (step + 1 < steps) load(step + 1);
    arch::cp_async_commit();
    if (column_tile == 0) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dh[j][e] = 0.0f;
      }
    }
    const uint32_t stage = arch::shared_address(shared + step % Shape::kRing * Shape::kStageBytes);

    // dh [16 rows of this warp] += dy B
    if (out_dh) {
      for (int term = 0; term < (params.B.remainder ? 2 : 1); ++term) {
        const uint32_t b_tile = stage + TileDy::kBytes + term * TileB::kBytes;
#pragma unroll
        for (int k = 0; k < Shape::kN; k += 16) {
          arch::FragmentA a;
          load_a<TileDy>(a, stage, warp * 16, k, lane);
#pragma unroll
          for (int j = 0; j < kRank / 16; ++j) {
            if (Rows::kListed && j * 16 >= params.rank) break;
            arch::FragmentB b[2];
            load_b_rows<TileB>(b, b_tile, k, j * 16, lane);
            arch::mma_m16n8k16<T>(dh[2 * j], a, b[0]);
            arch::mma_m16n8k16<T>(dh[2 * j + 1], a, b[1]);
          }
        }
      }
    }

    // dB [16 columns of dy of this warp] += dy^T h
    if (wants_dB) {
      arch::FragmentC sums[kColumnTiles] = {};
      const uint32_t h_tiles = arch::shared_address(h_tile(step));
#pragma unroll
      for (int k = 0; k < Shape::kM; k += 16) {
        arch::FragmentA a;
        load_a_transposed<TileDy>(a, stage, warp * 16, k, lane);
#pragma unroll
        for (int term = 0; term < (params.h.remainder ? 2 : 1); ++term) {
#pragma unroll
          for (int j = 0; j < kRank / 16; ++j) {
            if (Rows::kListed && j * 16 >= params.rank) break;
            arch::FragmentB b[2];
            load_b_rows<TileH>(b, h_tiles + term * TileH::kBytes, k, j * 16, lane);
            arch::mma_m16n8k16<T>(sums[2 * j], a, b[0]);
            arch::mma_m16n8k16<T>(sums[2 * j + 1], a, b[1]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = column_tile * Shape::kN + warp * 16 + e / 2 * 8 + lane / 4;
          dB_sums[n * kRank + j * 8 + lane % 4 * 2 + e % 2] += sums[j][e];
        }
      }
    }

    if (out_dh && column_tile == column_tiles - 1) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row = first_row + row_tile * Shape::kM + warp * 16 + e / 2 * 8 + lane / 4;
          const int column = j * 8 + lane % 4 * 2 + e % 2;
          if (row < M && column < params.rank) out_dh[row * params.stride + column] = dh[j][e];
        }
      }
    }
  }
  if (wants_dB) {
    __syncthreads();
    for (int64_t i = thread; i < columns * kRank; i += 128) {
      const int64_t column = i % kRank;
      if (column < params.rank) store(first_column + i / kRank, column, dB_sums[i]);
    }
  }
}

template <class T, int kRank>
__global__ void __launch_bounds__(128, kLeastBlocks)
    low_rank_up_grad_sm80_kernel(const __grid_constant__ UpGradParams<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int64_t M = params.dy.rows, N = params.dy.columns;
  const int64_t first_row = int64_t{blockIdx.y} * params.rows_per_block;
  const int64_t first_column = int64_t{blockIdx.x} * params.columns_per_block;
  const int64_t rows =
      M - first_row < params.rows_per_block ? M - first_row : params.rows_per_block;
  float* const dh = params.dh ? params.dh + int64_t{blockIdx.x} * M * params.stride : nullptr;
  up_grad_tile<T, kRank>(params, NeighbouringRows{}, first_row, rows, first_column, shared, dh,
                         params.dB != nullptr, [&](int64_t column, int64_t rank, float sum) {
                           float* const dB = params.dB + int64_t{blockIdx.y} * N * params.stride;
                           dB[column * params.stride + rank] = sum;
                         });
}

}  // namespace lora_ext::sm80
