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

// Results of the same rows, of which several have their columns of tiles beside each other, in
// their order, and their segments after each other.
template <class T, int kMostProducts, int kMostSegments>
struct ProductsParams {
  static constexpr int kProducts = kMostProducts;
  arch::TensorMap a[kMostSegments];  // [M, depth]
  arch::TensorMap b[kMostSegments];  // [N, depth], or [depth, N] for Major::kMN
  int64_t depth[kMostSegments];
  int ends[kProducts];    // of its segments, which begin where those before end
  int columns;            // of tiles
  int first[kProducts];   // of its columns of tiles; where there is no such product: 2^31 - 1
  int scaled[kProducts];  // of fp16: the segment behind those whose sums are multiplied by `back`
  const float* back[kProducts][2];
  int masked;  // dropout is applied to the sums of the first `masked` segments of one
  Dropout dropout;
  KeptBits kept;                   // its decisions, of one result; or none, to be drawn here
  const float* bias[kProducts];    // [N] or null
  arch::TensorMap out[kProducts];  // [M, N], contiguous, 16-byte aligned, N a multiple of 8
  int64_t M, N[kProducts];
  arch::WaitReport* report;
};
template <class T>
using ProductParams = ProductsParams<T, 1, kLayerSegments>;
template <class T>
using SeveralParams = ProductsParams<T, kMostTogether, kMaxSegments>;
static_assert(sizeof(SeveralParams<Bf16>) <= 4096, "what a kernel takes on every driver");

// A tile's product, and where it is in that one's result.
template <class Params, class Shape>
struct TilePlace {
  int product = 0;
  int64_t m, n;

  LORA_EXT_DEVICE TilePlace(const Params& params, TileCorner tile) : m(tile.m), n(tile.n) {
    if constexpr (Params::kProducts > 1) {
      const int column = static_cast<int>(tile.n / Shape::kN);
#pragma unroll
      for (int i = 1; i < Params::kProducts; ++i) product += column >= params.first[i];
      n -= int64_t{params.first[product]} * Shape::kN;
    }
  }
  LORA_EXT_DEVICE int first_segment(const Params& params) const {
    return Params::kProducts > 1 && product > 0 ? params.ends[product - 1] : 0;
  }
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

template <class T, class Shape, Major kMajorB, class Params = ProductParams<T>>
struct ProductTile {
  static constexpr int kSums = Shape::kN / 2;  // of a thread

  // ---- The thread that loads -------------------------------------------------------------------

  // What is outside of a matrix arrives as zero and counts as much.
  LORA_EXT_DEVICE static void load(const Params& params, int segment, uint32_t stage, uint32_t full,
                                   int m, int n, int k, Cluster cluster) {
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

  LORA_EXT_DEVICE static void load_tiles(const Params& params, Ring ring, Cluster cluster) {
    RingPosition at;
    TileWalk<Shape> walk(params.M, params.columns, cluster.size, cluster.rank);
    for (; walk.goes_on(); walk.advance()) {
      const TilePlace<Params, Shape> tile(params, walk.tile());
      const int m = static_cast<int>(tile.m), n = static_cast<int>(tile.n);
      const int end = params.ends[tile.product];
      for (int segment = tile.first_segment(params); segment < end; ++segment) {
        for (int64_t k = 0; k < params.depth[segment]; k += Shape::kK) {
          arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report, m, n);
          load(params, segment, ring.data(at.slot), ring.full(at.slot), m, n, static_cast<int>(k),
               cluster);
          at.advance(ring.count);
        }
      }
    }
    // Others release slots to this block, which must not end before.
    for (int slot = 0; slot < ring.count; ++slot) {
      arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report, -1, -1);
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
  LORA_EXT_DEVICE static void multiply_tiles(const Params& params, Ring ring, Cluster cluster,
                                             int number, int thread) {
    const int lane = thread % 32;
    const int warp = number * 4 + thread / 32;
    const int row_in_tile = warp * 16 + lane / 4;
    const uint32_t boxes =
        ring.shared +
        static_cast<uint32_t>(Shape::kBoxes + warp * StoreBoxes<Shape::kN>::kWarpBytes);
    float sums[kSums];
    TileBits<Shape::kN> bits;
    RingPosition at;
    TileWalk<Shape> walk(params.M, params.columns, cluster.size, cluster.rank);
    const auto load_bits = [&](const TileWalk<Shape>& of) {
      if (Params::kProducts > 1 || params.kept.data == nullptr || !of.goes_on()) return;
      const TileCorner tile = of.tile();
      bits.load(params.kept, tile.m + row_in_tile, tile.n, lane);
    };
    load_bits(walk);
    for (; walk.goes_on(); walk.advance()) {
      const TilePlace<Params, Shape> tile(params, walk.tile());
      const int64_t row = tile.m + row_in_tile, column = tile.n;
      int held = -1;  // a slot whose products may be running
      const auto release = [&] {
        if (held >= 0 && lane < cluster.size) {
          arch::mbarrier_arrive_at(arch::cluster_address(ring.empty(held), lane));
        }
      };
      bool accumulate = false;
      const int end = params.ends[tile.product];
      for (int segment = tile.first_segment(params); segment < end; ++segment) {
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
        if constexpr (kScaled<T>) {
          if (segment + 1 == params.scaled[tile.product]) {
            const float factor = back_of(params.back[tile.product]);
            arch::wgmma_wait<0>();
            arch::wgmma_fence_sums(sums);
#pragma unroll
            for (float& sum : sums) sum *= factor;
            arch::wgmma_fence_sums(sums);
          }
        }
        if (Params::kProducts == 1 && segment + 1 == params.masked) {
          arch::wgmma_wait<0>();
          arch::wgmma_fence_sums(sums);
          if (params.kept.data) {
            drop(sums, bits, column, lane);
          } else {
            drop(sums, params.dropout, row, column, lane);
          }
          arch::wgmma_fence_sums(sums);
        }
      }
      arch::wgmma_wait<0>();
      arch::wgmma_fence_sums(sums);
      release();
      TileWalk<Shape> next = walk;
      next.advance();
      load_bits(next);  // they arrive while this tile is stored
      const float* const bias = params.bias[tile.product];
      if (bias != nullptr) add_bias(sums, bias, column, params.N[tile.product], lane);
      store<T>(sums, params.out[tile.product], boxes, row - lane / 4, column, lane);
    }
    if (lane == 0) arch::tma_store_wait_read<0>();
  }
};

template <class T, class Shape, Major kMajorB, class Params>
LORA_EXT_DEVICE void run_products(const Params& params, uint8_t* shared) {
  using P = ProductTile<T, Shape, kMajorB, Params>;
  const Ring ring{.shared = arch::shared_address(shared),
                  .first = 0,
                  .bytes = Shape::kStageBytes,
                  .barriers = Shape::kBarriers,
                  .count = Shape::kRing};
  const Cluster cluster{arch::cluster_size(), arch::cluster_rank()};
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    int segment = 0;
#pragma unroll
    for (int i = 0; i < Params::kProducts; ++i) {
      if (i > 0 && params.ends[i] == 0) break;
      arch::tma_prefetch(params.out[i]);
      for (; segment < params.ends[i]; ++segment) {
        arch::tma_prefetch(params.a[segment]);
        arch::tma_prefetch(params.b[segment]);
      }
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
}

template <class T, class Shape, Major kMajorB>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ ProductParams<T> params) {
#if defined(LORA_EXT_SM90A)
  LORA_EXT_DYNAMIC_SHARED(shared);
  run_products<T, Shape, kMajorB>(params, shared);
#endif
}

// Several products, or one of more segments than a layer has. A kernel of its own: a single
// layer's does not search for its product, nor is it given as many tensor maps.
template <class T, class Shape, Major kMajorB>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    products_sm90_kernel(const __grid_constant__ SeveralParams<T> params) {
#if defined(LORA_EXT_SM90A)
  LORA_EXT_DYNAMIC_SHARED(shared);
  run_products<T, Shape, kMajorB>(params, shared);
#endif
}

}  // namespace lora_ext::sm90
