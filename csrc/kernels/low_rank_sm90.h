// The low-rank passes for sm_90a, h = dropout(x) A^T, dh = dy B, dB = dy^T h and
// dA = dh^T dropout(x): one kernel, which reads its matrix once. One thread copies tiles with TMA
// into a ring of shared memory, two warpgroups zero what dropout drops and multiply with wgmma. A
// block walks along the columns of one tile of rows after another. P of these rows is then
// complete, Q of the columns at the end. What blocks share they add in a fixed order: the blocks of
// a cluster at once, others as parts that are added afterwards.
#pragma once

#include "low_rank_sums_sm90.h"

namespace lora_ext::sm90 {

template <class T, class Shape>
struct LowRank {
  using Params = LowRankParams<T>;
  using Tile = LowRankTile<T, Shape>;
  using SharedSums = LowRankSums<T, Shape>;

  // The tiles of a block, in the order in which it walks them.
  struct Walk {
    int row_block, column_block;
    int first_row, last_row, first_column, last_column;

    LORA_EXT_DEVICE explicit Walk(const Params& params)
        : row_block(static_cast<int>(params.along_rows ? blockIdx.x : blockIdx.y)),
          column_block(static_cast<int>(params.along_rows ? blockIdx.y : blockIdx.x)),
          first_row(row_block * params.row_tiles),
          last_row(end(first_row + params.row_tiles, params.M, Shape::kRows)),
          first_column(column_block * params.column_tiles),
          last_column(end(first_column + params.column_tiles, params.C, Shape::kColumns)) {}

    LORA_EXT_DEVICE static int tiles(int64_t size, int step) {
      return static_cast<int>((size + step - 1) / step);
    }
    LORA_EXT_DEVICE static int end(int wanted, int64_t size, int step) {
      const int all = tiles(size, step);
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

  // Blocks of a cluster along the columns have the same rows: each reads its share of them for all.
  LORA_EXT_DEVICE static void load_R(const Params& params, uint32_t slot, uint32_t full, int bytes,
                                     int row, Cluster cluster) {
    arch::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(bytes));
    const bool shares = shares_R(params, cluster);
    const int skipped = shares ? cluster.rank * (Shape::kRows / cluster.size) : 0;
    uint32_t r = slot + static_cast<uint32_t>(skipped * Shape::kRankBox * 2);
    for (int term = 0; term < params.R_terms; ++term, r += Shape::kRBytes) {
      if (shares) {
#pragma unroll
        for (int box = 0; box < Shape::kRankBoxes; ++box) {
          arch::tma_load_2d_multicast(r + static_cast<uint32_t>(box * Shape::kRankBoxBytes),
                                      params.R[term], full, box * Shape::kRankBox, row + skipped,
                                      (1u << cluster.size) - 1);
        }
      } else {
        load_ranks(r, params.R[term], full, row);
      }
    }
  }
  LORA_EXT_DEVICE static bool shares_R(const Params& params, Cluster cluster) {
    return cluster.size > 1 && !params.along_rows;
  }

  LORA_EXT_DEVICE static void load_tiles(const Params& params, const Walk& walk, Ring stages,
                                         Ring Rs, const SharedSums& shared_sums) {
    RingPosition at, at_R;
    for (int row_tile = walk.first_row; row_tile < walk.last_row; ++row_tile) {
      const int row = row_tile * Shape::kRows;
      if (Shape::kQ && params.R_terms > 0) {
        arch::mbarrier_wait_bounded(Rs.empty(at_R.slot), at_R.parity ^ 1, params.report, row, 0);
        load_R(params, Rs.data(at_R.slot), Rs.full(at_R.slot), Rs.bytes, row, shared_sums.cluster);
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
    // Until the other blocks have released it they may reach for its shared memory.
    for (int slot = 0; Shape::kQ && params.R_terms > 0 && slot < Rs.count; ++slot) {
      arch::mbarrier_wait_bounded(Rs.empty(at_R.slot), at_R.parity ^ 1, params.report, -1, -1);
      at_R.advance(Rs.count);
    }
    if (Shape::kQ && params.adds_Q) {  // after those of P, each of which has its turn
      const int turns = params.adds_P ? walk.last_row - walk.first_row : 0;
      arch::mbarrier_wait_bounded(shared_sums.barriers + 8, turns % 2, params.report, -1, -1);
    }
  }

  // ---- A warpgroup that multiplies -------------------------------------------------------------

  // In P it has 64 rows of every tile, in Q the 64 columns of one box.
  struct Multiplier {
    const Params& params;
    uint8_t* shared;
    Ring stages, Rs;
    SharedSums shared_sums;
    int number, thread;  // of the warpgroup, and in it
    Draw draw;

    LORA_EXT_DEVICE Multiplier(const Params& params, uint8_t* shared, Ring stages, Ring Rs,
                               const SharedSums& shared_sums, int number, int thread)
        : params(params),
          shared(shared),
          stages(stages),
          Rs(Rs),
          shared_sums(shared_sums),
          number(number),
          thread(thread) {
      if (drops()) draw = Draw(params.dropout);
    }

    LORA_EXT_DEVICE bool drops() const { return Shape::kDrops && params.dropout.enabled; }

    // The first of this thread's rows of what its warpgroup sums.
    LORA_EXT_DEVICE int own_row() const { return number * 64 + thread / 32 * 16 + thread % 32 / 4; }

    LORA_EXT_DEVICE void release(uint32_t empty) const {
      if (thread % 32 == 0) arch::mbarrier_arrive(empty);
    }

    // A slot of R, of all blocks that share it.
    LORA_EXT_DEVICE void release_R(uint32_t empty) const {
      if (!shares_R(params, shared_sums.cluster)) return release(empty);
      const int lane = thread % 32;
      if (lane < shared_sums.cluster.size) {
        arch::mbarrier_arrive_at(arch::cluster_address(empty, lane));
      }
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

    // Parts of P and Q.
    LORA_EXT_DEVICE void store_p(typename Tile::Sums& p, int row_tile, int part) const {
      if (params.P == nullptr) return;
      arch::wgmma_fence_sums(p);
      Tile::store(p, params.P + int64_t{part} * params.M * params.P_stride,
                  int64_t{row_tile} * Shape::kRows + own_row(), params.M, params.rank,
                  params.P_stride, 1, thread % 32);
    }
    LORA_EXT_DEVICE void store_q(typename Tile::Sums& q, int column_tile, int part) const {
      if (params.Q == nullptr) return;
      arch::wgmma_fence_sums(q);
      Tile::store(q, params.Q + int64_t{part} * params.Q_part,
                  int64_t{column_tile} * Shape::kColumns + own_row(), params.C, params.rank,
                  params.Q_row, params.Q_column, thread % 32);
    }

    // Of all warpgroups: what wgmma has read may be overwritten.
    LORA_EXT_DEVICE static void end_of_reading() {
      arch::barrier_sync(3, Shape::kMultipliers * kWarpgroup);
    }

    // The slot that a block with so many tiles of columns reads last of a tile of rows.
    LORA_EXT_DEVICE int last_slot(const Walk& walk, int row_tile, int tiles) const {
      return ((row_tile - walk.first_row + 1) * tiles - 1) % stages.count;
    }

    // P of a tile of rows, added in the place of the stage that was read last.
    LORA_EXT_DEVICE void add_p(typename Tile::Sums& p, const Walk& walk, int row_tile) {
      const int slot = last_slot(walk, row_tile, walk.last_column - walk.first_column);
      arch::wgmma_fence_sums(p);
      end_of_reading();
      shared_sums.put(p, stages.offset(slot));
      shared_sums.publish();
      const Hidden<T>& out = params.hidden;
      const float factor = out.scaling.get();
      // The last of the blocks may have fewer tiles.
      const int each = params.column_tiles;
      const int left = (Walk::tiles(params.C, Shape::kColumns) - 1) % each + 1;
      const int others = stages.offset(last_slot(walk, row_tile, each));
      const int last = stages.offset(last_slot(walk, row_tile, left));
      shared_sums.add(others, last, 1, [&](int unit, const auto& all) {
        const int column = params.hidden_column + SharedSums::column_of(unit);
        if (column >= out.padded) return;
        const int64_t row = int64_t{row_tile} * Shape::kRows + SharedSums::row_of(unit);
        if (row < out.M) out.store_pair(all.sum[0], all.sum[1], factor, row, column);
        if (row + 8 < out.M) out.store_pair(all.sum[2], all.sum[3], factor, row + 8, column);
      });
      shared_sums.retire();
      arch::fence_proxy_async();
      release(stages.empty(slot));
    }

    // Q of all tiles of columns, at the end.
    template <int kCount>
    LORA_EXT_DEVICE void add_q(typename Tile::Sums (&q)[kCount], const Walk& walk) {
      const int tiles = walk.last_column - walk.first_column;
      end_of_reading();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        arch::wgmma_fence_sums(q[i]);
        if (i < tiles) shared_sums.put(q[i], i * SharedSums::kBytes);
      }
      shared_sums.publish();
      const float factor = params.gradient.factor();
      shared_sums.add(0, 0, tiles, [&](int unit, const auto& all) {
        const int tile = walk.first_column + unit / SharedSums::kUnits;
        const int column = SharedSums::column_of(unit % SharedSums::kUnits);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row =
              int64_t{tile} * Shape::kColumns + SharedSums::row_of(unit) + i / 2 * 8;
          if (row >= params.C || column + i % 2 >= params.rank) continue;
          const int64_t at = row * params.Q_row + (column + i % 2) * params.Q_column;
          params.gradient.store(all.sum[i], factor, at);
        }
      });
      shared_sums.retire();
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

    LORA_EXT_DEVICE void run(const Walk& walk) {
      constexpr int kQTiles = Shape::kQ ? Shape::kMostColumnTiles : 1;
      [[maybe_unused]] typename Tile::Sums p, q[kQTiles];
      RingPosition at, at_R;
      const bool adds_p = Shape::kP && params.adds_P;
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
          const int slot = at.slot;
          at.advance(stages.count);
          // Dropout takes as long as a tile takes to arrive: the next one's while products run.
          const bool row_ends = tile + 1 == walk.last_column;
          prepared = drops() && !(row_ends && row_tile + 1 == walk.last_row);
          if (prepared) prepare(at, row_tile + row_ends, row_ends ? walk.first_column : tile + 1);
          arch::wgmma_wait<0>();
          if (!(row_ends && adds_p)) release(stages.empty(slot));
        }
        if (Shape::kQ && params.R_terms > 0) {
          release_R(Rs.empty(at_R.slot));
          at_R.advance(Rs.count);
        }
        if constexpr (Shape::kP) {
          if (adds_p) {
            add_p(p, walk, row_tile);
          } else {
            store_p(p, row_tile, walk.column_block);
          }
        }
      }
      if constexpr (Shape::kQ) {
        if (params.adds_Q) return add_q(q, walk);
#pragma unroll
        for (int i = 0; i < kQTiles; ++i) {
          const int tile = walk.first_column + i;
          if (tile < walk.last_column) store_q(q[i], tile, walk.row_block);
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
  const auto sums_barriers =
      static_cast<uint32_t>(layout.barriers + (layout.stages + kRSlots) * 16);
  const Cluster cluster{arch::cluster_size(), arch::cluster_rank()};
  const typename Pass::SharedSums shared_sums{.shared = shared,
                                              .address = address,
                                              .barriers = address + sums_barriers,
                                              .cluster = cluster,
                                              .blocks = params.adders,
                                              .thread = thread - kWarpgroup};
  if (thread == 0) {
    arch::tma_prefetch(params.X);
    for (int term = 0; term < params.L_terms; ++term) arch::tma_prefetch(params.L[term]);
    for (int term = 0; term < params.R_terms; ++term) arch::tma_prefetch(params.R[term]);
    stages.initialise(Shape::kMultipliers * kWarpgroup / 32);
    Rs.initialise(Shape::kMultipliers * kWarpgroup / 32 *
                  (Pass::shares_R(params, cluster) ? cluster.size : 1));
    shared_sums.initialise();
    arch::fence_mbarrier_init();
  }
  arch::cluster_sync();
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  if (thread < kWarpgroup) {
    arch::register_decrease<kLoadRegisters>();
    if (thread == 0) Pass::load_tiles(params, walk, stages, Rs, shared_sums);
  } else {
    arch::register_increase<kMultiplyRegisters>();
    typename Pass::Multiplier multiplier(params, shared, stages, Rs, shared_sums,
                                         thread / kWarpgroup - 1, thread % kWarpgroup);
    multiplier.run(walk);
  }
#endif
}

}  // namespace lora_ext::sm90
