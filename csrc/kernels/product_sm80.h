// The product of several segments (lora_linear_passes.h) for sm_80 and later. The segments are
// walked as one loop over k through one ring of shared memory, so that a low-rank segment costs
// ceil(r / 64) trips more and nothing else.
#pragma once

#include "lora_linear_passes.h"
#include "tile_sm80.h"
#include "tile_walk.h"

namespace lora_ext::sm80 {

template <int kTileM, int kTileN, int kWarpM, int kWarpN, int kStages>
struct ProductShape {
  static constexpr int kM = kTileM, kN = kTileN, kK = 64;
  static constexpr int kWarpRows = kWarpM, kWarpColumns = kWarpN;
  static constexpr int kWarpsM = kTileM / kWarpM, kWarpsN = kTileN / kWarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRing = kStages;
  static constexpr int kStageBytes = (kTileM + kTileN) * kK * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// The sums of one warp: kWarpRows x kWarpColumns, as mma_m16n8k16 holds them.
template <class Shape>
struct WarpSums {
  static constexpr int kRowTiles = Shape::kWarpRows / 16, kColumnTiles = Shape::kWarpColumns / 8;
  arch::FragmentC value[kRowTiles][kColumnTiles];

  LORA_EXT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i][j][e] = 0.0f;
      }
    }
  }

  // Zeroes what dropout drops; (row, column) is the warp's corner in the matrix. One Philox call
  // decides for eight columns, 16 apart.
  LORA_EXT_DEVICE void drop(DropoutRng rng, uint32_t threshold, int64_t row, int64_t column,
                            int lane) {
    const int64_t block = column / kDropoutBlock;
    const int first_slot = static_cast<int>(column % kDropoutBlock) / kDropoutLanes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {  // columns 2t, 2t + 1, 2t + 8, 2t + 9 of every 16
          const int in_slot = lane % 4 * 2 + c % 2 + c / 2 * 8;
          const PhiloxBlock bits =
              dropout_bits(rng, row + i * 16 + half * 8 + lane / 4, block, in_slot);
#pragma unroll
          for (int j = 0; j < kColumnTiles / 2; ++j) {
            if (!keeps(bits, first_slot + j, threshold)) {
              value[i][2 * j + c / 2][half * 2 + c % 2] = 0.0f;
            }
          }
        }
      }
    }
  }

  // The same by what another pass has decided.
  LORA_EXT_DEVICE void drop(const KeptBits& kept, int64_t row, int64_t column, int lane) {
    const uint32_t* const words = kept.at(row + lane / 4, column / kDropoutBlock);
    const int first_slot = static_cast<int>(column % kDropoutBlock) / kDropoutLanes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeptLanes lanes = KeptLanes::load(words, i * 16 + half * 8, lane);
        const uint32_t bytes = lanes.bytes(lane) >> first_slot;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int j = 0; j < kColumnTiles / 2; ++j) {
            if (!(bytes >> (c * 8 + j) & 1u)) value[i][2 * j + c / 2][half * 2 + c % 2] = 0.0f;
          }
        }
      }
    }
  }
};

template <class T, class Shape, BLayout kLayout>
struct ProductTile {
  using TileA = Tile<Shape::kM, Shape::kK>;
  using TileB = Tile<kLayout == BLayout::kColumns ? Shape::kN : Shape::kK,
                     kLayout == BLayout::kColumns ? Shape::kK : Shape::kN>;

  // Where the loop over k stands.
  struct Position {
    int segment = 0;
    int64_t k = 0;

    LORA_EXT_DEVICE void advance(const Product<T>& params) {
      k += Shape::kK;
      if (k >= params.segments[segment].a.columns) ++segment, k = 0;
    }
  };

  LORA_EXT_DEVICE static int64_t steps(const Product<T>& params) {
    int64_t total = 0;
    for (int s = 0; s < params.count; ++s) {
      total += (params.segments[s].a.columns + Shape::kK - 1) / Shape::kK;
    }
    return total;
  }

  LORA_EXT_DEVICE static void load(uint8_t* stage, const Product<T>& params, Position at, int64_t m,
                                   int64_t n, int thread) {
    const Segment<T>& segment = params.segments[at.segment];
    const int64_t b_row = kLayout == BLayout::kColumns ? n : at.k;
    const int64_t b_column = kLayout == BLayout::kColumns ? at.k : n;
    if (params.aligned) {
      const uint32_t shared = arch::shared_address(stage);
      TileA::template load<Shape::kThreads>(shared, segment.a, m, at.k, thread);
      TileB::template load<Shape::kThreads>(shared + TileA::kBytes, segment.b, b_row, b_column,
                                            thread);
    } else {
      TileA::template load_elements<Shape::kThreads>(stage, segment.a, m, at.k, thread);
      TileB::template load_elements<Shape::kThreads>(stage + TileA::kBytes, segment.b, b_row,
                                                     b_column, thread);
    }
  }

  // sums += the product of one stage, of which `depth` columns of A are left: a low-rank segment
  // needs no more steps than its rank
  LORA_EXT_DEVICE static void multiply(WarpSums<Shape>& sums, uint32_t stage, int64_t depth,
                                       int warp_row, int warp_column, int lane) {
    constexpr int kRowTiles = WarpSums<Shape>::kRowTiles;
    constexpr int kColumnTiles = WarpSums<Shape>::kColumnTiles;
#pragma unroll
    for (int k = 0; k < Shape::kK; k += 16) {
      if (k >= depth) break;
      arch::FragmentA a[kRowTiles];
      arch::FragmentB b[kColumnTiles / 2][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_a<TileA>(a[i], stage, warp_row + i * 16, k, lane);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        if constexpr (kLayout == BLayout::kColumns) {
          load_b<TileB>(b[j], stage + TileA::kBytes, k, warp_column + j * 16, lane);
        } else {
          load_b_rows<TileB>(b[j], stage + TileA::kBytes, k, warp_column + j * 16, lane);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          arch::mma_m16n8k16<T>(sums.value[i][j], a[i], b[j / 2][j % 2]);
        }
      }
    }
  }

  LORA_EXT_DEVICE static void store(const WarpSums<Shape>& sums, const Product<T>& params,
                                    int64_t row, int64_t column, int lane) {
#pragma unroll
    for (int i = 0; i < WarpSums<Shape>::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + i * 16 + half * 8 + lane / 4;
        if (m >= params.M) continue;
#pragma unroll
        for (int j = 0; j < WarpSums<Shape>::kColumnTiles; ++j) {
          const int64_t n = column + j * 8 + lane % 4 * 2;
          if (n >= params.N) continue;
          const bool pair = n + 1 < params.N;
          float first = sums.value[i][j][half * 2], second = sums.value[i][j][half * 2 + 1];
          if (params.bias) {
            first += params.bias[n];
            second += pair ? params.bias[n + 1] : 0.0f;
          }
          T* out = params.out + m * params.N + n;
          if (pair && params.N % 2 == 0) {
            *reinterpret_cast<uint32_t*>(out) = pack_pair<T>(first, second);
          } else {
            out[0] = rounded<T>(first);
            if (pair) out[1] = rounded<T>(second);
          }
        }
      }
    }
  }
};

template <class T, class Shape, BLayout kLayout>
__global__ void __launch_bounds__(Shape::kThreads, kLeastBlocks)
    product_sm80_kernel(const __grid_constant__ Product<T> params) {
  using P = ProductTile<T, Shape, kLayout>;
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / Shape::kWarpsN * Shape::kWarpRows;
  const int warp_column = warp % Shape::kWarpsN * Shape::kWarpColumns;
  const auto [m, n] = TileWalk<Shape>::tile(params.N);
  const auto stage = [&](int64_t step) {
    return shared + step % Shape::kRing * Shape::kStageBytes;
  };

  WarpSums<Shape> sums;
  sums.clear();
  const int64_t steps = P::steps(params);
  typename P::Position loading, multiplying;
#pragma unroll
  for (int s = 0; s < Shape::kRing - 1; ++s) {
    if (s < steps) {
      P::load(stage(s), params, loading, m, n, thread);
      loading.advance(params);
    }
    arch::cp_async_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    arch::cp_async_wait<Shape::kRing - 2>();
    __syncthreads();  // the stage has arrived for every thread, and every thread is done with the
                      // last
    if (step + Shape::kRing - 1 < steps) {
      P::load(stage(step + Shape::kRing - 1), params, loading, m, n, thread);
      loading.advance(params);
    }
    arch::cp_async_commit();
    const int64_t depth = params.segments[multiplying.segment].a.columns - multiplying.k;
    P::multiply(sums, arch::shared_address(stage(step)), depth, warp_row, warp_column, lane);
    multiplying.advance(params);
    if (multiplying.k == 0 && multiplying.segment == params.masked) {
      if (params.kept.data) {
        sums.drop(params.kept, m + warp_row, n + warp_column, lane);
      } else {
        sums.drop(params.dropout.rng(), params.dropout.threshold, m + warp_row, n + warp_column,
                  lane);
      }
    }
  }
  P::store(sums, params, m + warp_row, n + warp_column, lane);
}

}  // namespace lora_ext::sm80
