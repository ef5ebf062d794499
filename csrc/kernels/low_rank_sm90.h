// The low-rank passes for sm_90a, h = dropout(x) A^T, dh = dy B, dB = dy^T h and
// dA = dh^T dropout(x): one kernel, which reads its matrix once. One thread copies tiles with TMA
// into a ring of shared memory, two warpgroups zero what dropout drops and multiply with wgmma. A
// block walks along the columns of one tile of rows after another. P of these rows is then
// complete, Q of the columns at the end. What blocks share is written as parts and added in a
// fixed order afterwards.
#pragma once

#include "low_rank_tile_sm90.h"

namespace lora_ext::sm90 {

template <class T, class Shape>
struct LowRank {
  using Params = LowRankParams<T>;
  using Tile = LowRankTile<T, Shape>;

  // The tiles of a block, in the order in which it walks them.
  struct Walk {
    int first_row, last_row, first_column, last_column;

    LORA_EXT_DEVICE explicit Walk(const Params& params)
        : first_row(static_cast<int>(blockIdx.y) * params.row_tiles),
          last_row(end(first_row + params.row_tiles, params.M, Shape::kRows)),
          first_column(static_cast<int>(blockIdx.x) * params.column_tiles),
          last_column(end(first_column + params.column_tiles, params.C, Shape::kColumns)) {}

    LORA_EXT_DEVICE static int end(int wanted, int64_t size, int step) {
      const int all = static_cast<int>((size + step - 1) / step);
      return wanted < all ? wanted : all;
    }
  };

  // ---- The thread that loads -------------------------------------------------------------------

  // What is outside of a matrix arrives as zero and counts as much.
  LORA_EXT_DEVICE static void load_stage(const Params& params, uint32_t stage, uint32_t full,
                                         int bytes, int row, int column) {
    arch::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(bytes));
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box) {
      arch::tma_load_2d(stage + static_cast<uint32_t>(box * Shape::kBoxBytes), params.X, full,
                        column + box * 64, row);
    }
    uint32_t l = stage + Shape::kXBytes;
    for (int term = 0; term < params.L_terms; ++term, l += Shape::kLBytes) {
      if constexpr (Shape::kMajorL == Major::kMN) {
        load_ranks(l, params.L[term], full, column);
      } else {
#pragma unroll
        for (int box = 0; box < Shape::kBoxes; ++box) {
          arch::tma_load_2d(l + static_cast<uint32_t>(box * Shape::kN * kRowBytes), params.L[term],
                            full, column + box * 64, 0);
        }
      }
    }
  }

  // 128 rows of a matrix of which the rank is contiguous
  LORA_EXT_DEVICE static void load_ranks(uint32_t shared, const arch::TensorMap& map, uint32_t full,
                                         int row) {
#pragma unroll
    for (int box = 0; box < Shape::kRankBoxes; ++box) {
      arch::tma_load_2d(shared + static_cast<uint32_t>(box * Shape::kRankBoxBytes), map, full,
                        box * Shape::kRankBox, row);
    }
  }

  LORA_EXT_DEVICE static void load_R(const Params& params, uint32_t slot, uint32_t full, int bytes,
                                     int row) {
    arch::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(bytes));
    for (int term = 0; term < params.R_terms; ++term) {
      load_ranks(slot + static_cast<uint32_t>(term * Shape::kRBytes), params.R[term], full, row);
    }
  }

  LORA_EXT_DEVICE static void load_tiles(const Params& params, const Walk& walk, Ring stages,
                                         Ring Rs) {
    RingPosition at, at_R;
    for (int row_tile = walk.first_row; row_tile < walk.last_row; ++row_tile) {
      const int row = row_tile * Shape::kRows;
      if (Shape::kQ && params.R_terms > 0) {
        arch::mbarrier_wait_bounded(Rs.empty(at_R.slot), at_R.parity ^ 1, params.report, row, 0);
        load_R(params, Rs.data(at_R.slot), Rs.full(at_R.slot), Rs.bytes, row);
        at_R.advance(Rs.count);
      }
      for (int tile = walk.first_column; tile < walk.last_column; ++tile) {
        const int c = tile * Shape::kColumns;
        arch::mbarrier_wait_bounded(stages.empty(at.slot), at.parity ^ 1, params.report, row, c);
        load_stage(params, stages.data(at.slot), stages.full(at.slot), stages.bytes, row, c);
        at.advance(stages.count);
      }
    }
    // Of a wait without end somebody has to tell.
    for (int slot = 0; slot < stages.count; ++slot) {
      arch::mbarrier_wait_bounded(stages.empty(at.slot), at.parity ^ 1, params.report, -1, -1);
      at.advance(stages.count);
    }
  }

  // ---- A warpgroup that multiplies -------------------------------------------------------------

  // In P it has 64 rows of every tile, in Q the 64 columns of one box.
  struct Multiplier {
    const Params& params;
    uint8_t* shared;
    Ring stages, Rs;
    int number, thread;  // of the warpgroup, and in it
    Draw draw;

    LORA_EXT_DEVICE Multiplier(const Params& params, uint8_t* shared, Ring stages, Ring Rs,
                               int number, int thread)
        : params(params), shared(shared), stages(stages), Rs(Rs), number(number), thread(thread) {
      if (drops()) draw = Draw(params.dropout);
    }

    LORA_EXT_DEVICE bool drops() const { return Shape::kDrops && params.dropout.enabled; }

    // The first of this thread's rows of what its warpgroup sums.
    LORA_EXT_DEVICE int own_row() const { return number * 64 + thread / 32 * 16 + thread % 32 / 4; }

    LORA_EXT_DEVICE void release(uint32_t empty) const {
      if (thread % 32 == 0) arch::mbarrier_arrive(empty);
    }

    // Each warpgroup drops its rows; of Q both read all.
    LORA_EXT_DEVICE void drop(uint8_t* stage, int row_tile, int column_tile) const {
      Tile::drop(stage + number * 64 * kRowBytes, draw,
                 int64_t{row_tile} * Shape::kRows + number * 64, column_tile, params.kept, thread);
      arch::fence_proxy_async();
      if constexpr (Shape::kQ) {
        arch::barrier_sync(1, Shape::kMultipliers * kWarpgroup);
      } else {
        arch::barrier_sync(1 + number, kWarpgroup);
      }
    }

    // The products of one stage; `first`: of the first tile of its rows, or columns.
    LORA_EXT_DEVICE void multiply_p(typename Tile::Sums& p, uint32_t stage, bool first) const {
#pragma unroll 1
      for (int term = 0; term < params.L_terms; ++term) {
        Tile::multiply_p(p, stage + static_cast<uint32_t>(number * 64 * kRowBytes),
                         stage + static_cast<uint32_t>(Shape::kXBytes + term * Shape::kLBytes),
                         !first || term > 0);
      }
    }
    LORA_EXT_DEVICE void multiply_q(typename Tile::Sums& q, uint32_t stage, uint32_t r,
                                    bool first) const {
#pragma unroll 1
      for (int term = 0; term < params.R_terms; ++term) {
        Tile::multiply_q(q, stage + static_cast<uint32_t>(number * Shape::kBoxBytes),
                         r + static_cast<uint32_t>(term * Shape::kRBytes), !first || term > 0);
      }
    }

    LORA_EXT_DEVICE void store_p(typename Tile::Sums& p, int row_tile) const {
      if (params.P == nullptr) return;
      arch::wgmma_fence_sums(p);
      Tile::store(p, params.P + int64_t{blockIdx.x} * params.M * params.P_stride,
                  int64_t{row_tile} * Shape::kRows + own_row(), params.M, params.rank,
                  params.P_stride, 1, thread % 32);
    }
    LORA_EXT_DEVICE void store_q(typename Tile::Sums& q, int column_tile) const {
      if (params.Q == nullptr) return;
      arch::wgmma_fence_sums(q);
      Tile::store(q, params.Q + int64_t{blockIdx.y} * params.Q_part,
                  int64_t{column_tile} * Shape::kColumns + own_row(), params.C, params.rank,
                  params.Q_row, params.Q_column, thread % 32);
    }

    // f(q[index]): registers have no addresses, so that each index has code of its own.
    template <int kIndex, int kCount, class F>
    LORA_EXT_DEVICE static void with_sums(typename Tile::Sums (&q)[kCount], int index, const F& f) {
      if constexpr (kIndex < kCount) {
        if (index == kIndex) {
          f(q[kIndex]);
        } else {
          with_sums<kIndex + 1>(q, index, f);
        }
      }
    }

    // Waits for the tile in this slot, and drops what dropout drops of it.
    LORA_EXT_DEVICE void prepare(RingPosition at, int row_tile, int column_tile) const {
      arch::mbarrier_wait(stages.full(at.slot), at.parity);
      if (drops()) drop(shared + stages.offset(at.slot), row_tile, column_tile);
    }

    LORA_EXT_DEVICE void run(const Walk& walk) const {
      constexpr int kQTiles = Shape::kQ ? Shape::kMostColumnTiles : 1;
      [[maybe_unused]] typename Tile::Sums p, q[kQTiles];
      RingPosition at, at_R;
      bool prepared = false;
      for (int row_tile = walk.first_row; row_tile < walk.last_row; ++row_tile) {
        if (Shape::kQ && params.R_terms > 0) {
          arch::mbarrier_wait(Rs.full(at_R.slot), at_R.parity);
        }
        for (int tile = walk.first_column; tile < walk.last_column; ++tile) {
          if (!prepared) prepare(at, row_tile, tile);
          const uint32_t stage = stages.data(at.slot);
          if constexpr (Shape::kP) multiply_p(p, stage, tile == walk.first_column);
          if constexpr (Shape::kQ) {
            const uint32_t r = Rs.data(at_R.slot);
            with_sums<0>(q, tile - walk.first_column, [&](typename Tile::Sums& sums) {
              multiply_q(sums, stage, r, row_tile == walk.first_row);
            });
          }
          const uint32_t empty = stages.empty(at.slot);
          at.advance(stages.count);
          // Dropout takes as long as a tile takes to arrive: the next one's while products run.
          const bool row_ends = tile + 1 == walk.last_column;
          prepared = drops() && !(row_ends && row_tile + 1 == walk.last_row);
          if (prepared) prepare(at, row_tile + row_ends, row_ends ? walk.first_column : tile + 1);
          arch::wgmma_wait<0>();
          release(empty);
        }
        if (Shape::kQ && params.R_terms > 0) {
          release(Rs.empty(at_R.slot));
          at_R.advance(Rs.count);
        }
        if constexpr (Shape::kP) store_p(p, row_tile);
      }
      if constexpr (Shape::kQ) {
#pragma unroll
        for (int i = 0; i < kQTiles; ++i) {
          if (walk.first_column + i < walk.last_column) store_q(q[i], walk.first_column + i);
        }
      }
    }
  };
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    low_rank_sm90_kernel(const __grid_constant__ LowRankParams<T> params) {
#if defined(LORA_EXT_SM90A)
  using Pass = LowRank<T, Shape>;
  LORA_EXT_DYNAMIC_SHARED(shared);
  const LowRankLayout& layout = params.layout;
  const uint32_t address = arch::shared_address(shared);
  const Ring stages{.shared = address,
                    .first = 0,
                    .bytes = layout.stage_bytes,
                    .barriers = layout.barriers,
                    .count = layout.stages};
  const Ring Rs{.shared = address,
                .first = layout.R_tiles,
                .bytes = layout.R_bytes,
                .barriers = layout.barriers + layout.stages * 16,
                .count = kRSlots};
  const typename Pass::Walk walk(params);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    arch::tma_prefetch(params.X);
    for (int term = 0; term < params.L_terms; ++term) arch::tma_prefetch(params.L[term]);
    for (int term = 0; term < params.R_terms; ++term) arch::tma_prefetch(params.R[term]);
    stages.initialise(Shape::kMultipliers * kWarpgroup / 32);
    Rs.initialise(Shape::kMultipliers * kWarpgroup / 32);
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  if (thread < kWarpgroup) {
    arch::register_decrease<kLoadRegisters>();
    if (thread == 0) Pass::load_tiles(params, walk, stages, Rs);
  } else {
    arch::register_increase<kMultiplyRegisters>();
    const typename Pass::Multiplier multiplier(params, shared, stages, Rs, thread / kWarpgroup - 1,
                                               thread % kWarpgroup);
    multiplier.run(walk);
  }
#endif
}

}  // namespace lora_ext::sm90
