// The product of several segments (lora_linear_passes.h) for sm_90a: one warp copies tiles with TMA
// into a ring of shared memory, two warpgroups multiply them with wgmma, and blocks stay for all
// their tiles, so that the ring is filled for the next tile while the last one is stored. The
// blocks of a cluster have the same columns of the result: each reads its share of B for all of
// them, since L2 does not feed the tensor cores of all multiprocessors with whole tiles (fast.cu,
// Pranjal Shankhdhar, 2024).
#pragma once

#include "epilogue_sm90.h"
#include "tile_walk.h"

namespace lora_ext::sm90 {

template <class T>
struct ProductParams {
  arch::TensorMap a[kMaxSegments];  // [M, depth]
  arch::TensorMap b[kMaxSegments];  // [N, depth], or [depth, N] for Major::kMN
  int64_t depth[kMaxSegments];
  int count;
  int masked;  // dropout is applied to the sums of the first `masked` segments
  Dropout dropout;
  const float* bias;    // [N] or null
  arch::TensorMap out;  // [M, N], contiguous, 16-byte aligned, N a multiple of 8
  int64_t M, N;
  arch::WaitReport* report;
};

template <int kTileN, int kStages>
struct ProductShape {
  static constexpr int kM = 128, kN = kTileN, kK = kRowBytes / 2;
  static constexpr int kMultipliers = 2;  // warpgroups, 64 rows of the tile each
  static constexpr int kThreads = (1 + kMultipliers) * kWarpgroup;
  static constexpr int kRing = kStages;
  static constexpr int kABytes = kM * kRowBytes, kBBytes = kN * kRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  template <Major kMajorB>  // of a box of B: one, or one for every 64 columns
  static constexpr int kBoxRows = kMajorB == Major::kK ? kN : kK;
  static constexpr int kBoxes = kRing * kStageBytes;  // where the tile's way out begins
  static constexpr int kBarriers = kBoxes + kMultipliers * 4 * StoreBoxes<kN>::kWarpBytes;
  static constexpr int kSharedBytes = kBarriers + kRing * 16;
  static_assert(kSharedBytes <= kMostSharedBytes);
  static_assert((kLoadRegisters + kMultipliers * kMultiplyRegisters) * kWarpgroup <= 65536);
  static_assert(kStageBytes % 1024 == 0, "swizzled tiles begin at multiples of 1024 bytes");
};

template <class T, class Shape, Major kMajorB>
struct ProductTile {
  static constexpr int kSums = Shape::kN / 2;  // of a thread

  // ---- The thread that loads -------------------------------------------------------------------

  // What is outside of a matrix arrives as zero and counts as much.
  LORA_EXT_DEVICE static void load(const ProductParams<T>& params, int segment, uint32_t stage,
                                   uint32_t full, int m, int n, int k, Cluster cluster) {
    arch::mbarrier_arrive_expect_tx(full, Shape::kStageBytes);
    arch::tma_load_2d(stage, params.a[segment], full, k, m);
    // A box of B has kBoxRows rows; this block's share begins `skipped` rows into it.
    const int skipped = cluster.rank * Shape::template kBoxRows<kMajorB> / cluster.size;
    const uint32_t b = stage + static_cast<uint32_t>(Shape::kABytes + skipped * kRowBytes);
    if constexpr (kMajorB == Major::kK) {
      load_B(params.b[segment], b, full, k, n + skipped, cluster);
    } else {
#pragma unroll
      for (int column = 0; column < Shape::kN; column += 64) {
        load_B(params.b[segment], b + static_cast<uint32_t>(column / 64 * Shape::kK * kRowBytes),
               full, n + column, k + skipped, cluster);
      }
    }
  }

  LORA_EXT_DEVICE static void load_B(const arch::TensorMap& map, uint32_t shared, uint32_t full,
                                     int column, int row, Cluster cluster) {
    if (cluster.size == 1) {
      arch::tma_load_2d(shared, map, full, column, row);
    } else {
      arch::tma_load_2d_multicast(shared, map, full, column, row, (1u << cluster.size) - 1);
    }
  }

  LORA_EXT_DEVICE static void load_tiles(const ProductParams<T>& params, Ring ring,
                                         Cluster cluster) {
    RingPosition at;
    TileWalk<Shape> walk(params.M, params.N, cluster.size, cluster.rank);
    for (; walk.goes_on(); walk.advance()) {
      const TileCorner tile = walk.tile();
      const int m = static_cast<int>(tile.m), n = static_cast<int>(tile.n);
      for (int segment = 0; segment < params.count; ++segment) {
        for (int64_t k = 0; k < params.depth[segment]; k += Shape::kK) {
          arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report);
          load(params, segment, ring.data(at.slot), ring.full(at.slot), m, n, static_cast<int>(k),
               cluster);
          at.advance(ring.count);
        }
      }
    }
    // Others release slots to this block, which must not end before.
    for (int slot = 0; slot < ring.count; ++slot) {
      arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report);
      at.advance(ring.count);
    }
  }

  // ---- A warpgroup that multiplies -------------------------------------------------------------

  // sums (+)= the products of 16 columns of A, from the k-th of the stage.
  LORA_EXT_DEVICE static void multiply_16(float (&sums)[kSums], uint32_t a, uint32_t b, int k,
                                          bool accumulate) {
    const auto k_bytes = static_cast<uint32_t>(k * 2),
               k_rows = static_cast<uint32_t>(k * kRowBytes);
    arch::wgmma<T, Shape::kN, Major::kK, kMajorB>(
        sums, arch::wgmma_descriptor(a + k_bytes, 16, 8 * kRowBytes, Swizzle::k128),
        arch::wgmma_descriptor(b + (kMajorB == Major::kK ? k_bytes : k_rows), Shape::kK * kRowBytes,
                               8 * kRowBytes, Swizzle::k128),
        accumulate);
  }

  // sums (+)= the product of one stage, of which `depth` columns of A are left: a low-rank segment
  // needs no more steps than its rank. A whole stage is without branches, for ptxas.
  LORA_EXT_DEVICE static void multiply(float (&sums)[kSums], uint32_t a, uint32_t b, int64_t depth,
                                       bool accumulate) {
    if (depth >= Shape::kK) {
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < Shape::kK; k += 16) multiply_16(sums, a, b, k, accumulate || k > 0);
      arch::wgmma_commit();
    } else {
#pragma unroll 1
      for (int k = 0; k < depth; k += 16) {
        arch::wgmma_fence();
        multiply_16(sums, a, b, k, accumulate || k > 0);
        arch::wgmma_commit();
      }
    }
  }

  // `thread` of the warpgroup `number`.
  LORA_EXT_DEVICE static void multiply_tiles(const ProductParams<T>& params, Ring ring,
                                             Cluster cluster, int number, int thread) {
    const int lane = thread % 32;
    const int warp = number * 4 + thread / 32;
    const int row_in_tile = warp * 16 + lane / 4;
    const uint32_t boxes =
        ring.shared +
        static_cast<uint32_t>(Shape::kBoxes + warp * StoreBoxes<Shape::kN>::kWarpBytes);
    float sums[kSums];
    RingPosition at;
    TileWalk<Shape> walk(params.M, params.N, cluster.size, cluster.rank);
    for (; walk.goes_on(); walk.advance()) {
      const TileCorner tile = walk.tile();
      const int64_t row = tile.m + row_in_tile, column = tile.n;
      int held = -1;  // a slot whose products may be running
      const auto release = [&] {
        if (held >= 0 && lane < cluster.size) {
          arch::mbarrier_arrive_at(arch::cluster_address(ring.empty(held), lane));
        }
      };
      bool accumulate = false;
      for (int segment = 0; segment < params.count; ++segment) {
        for (int64_t k = 0; k < params.depth[segment]; k += Shape::kK) {
          arch::mbarrier_wait(ring.full(at.slot), at.parity);
          const uint32_t a = ring.data(at.slot);
          multiply(sums, a + static_cast<uint32_t>(number * 64 * kRowBytes), a + Shape::kABytes,
                   params.depth[segment] - k, accumulate);
          accumulate = true;
          arch::wgmma_wait<1>();  // the products of this stage run on, those of the last are done
          release();
          held = at.slot;
          at.advance(ring.count);
        }
        if (segment + 1 == params.masked) {
          arch::wgmma_wait<0>();
          arch::wgmma_fence_sums(sums);
          drop(sums, params.dropout, row, column, lane);
          arch::wgmma_fence_sums(sums);
        }
      }
      arch::wgmma_wait<0>();
      arch::wgmma_fence_sums(sums);
      release();
      if (params.bias != nullptr) add_bias(sums, params.bias, column, params.N, lane);
      store<T>(sums, params.out, boxes, row - lane / 4, column, lane);
    }
    if (lane == 0) arch::tma_store_wait_read<0>();
  }
};

template <class T, class Shape, Major kMajorB>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ ProductParams<T> params) {
#if defined(LORA_EXT_SM90A)
  using P = ProductTile<T, Shape, kMajorB>;
  LORA_EXT_DYNAMIC_SHARED(shared);
  const Ring ring{.shared = arch::shared_address(shared),
                  .first = 0,
                  .bytes = Shape::kStageBytes,
                  .barriers = Shape::kBarriers,
                  .count = Shape::kRing};
  const Cluster cluster{arch::cluster_size(), arch::cluster_rank()};
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    arch::tma_prefetch(params.out);
    for (int segment = 0; segment < params.count; ++segment) {
      arch::tma_prefetch(params.a[segment]);
      arch::tma_prefetch(params.b[segment]);
    }
    ring.initialise(Shape::kMultipliers * kWarpgroup / 32 * cluster.size);
    arch::fence_mbarrier_init();
  }
  arch::cluster_sync();
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  if (thread < kWarpgroup) {
    arch::register_decrease<kLoadRegisters>();
    if (thread == 0) P::load_tiles(params, ring, cluster);
  } else {
    arch::register_increase<kMultiplyRegisters>();
    P::multiply_tiles(params, ring, cluster, thread / kWarpgroup - 1, thread % kWarpgroup);
  }
#endif
}

}  // namespace lora_ext::sm90
