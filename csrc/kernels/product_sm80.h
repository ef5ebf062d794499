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

  LORA_EXT_DEVICE void multiply_by(float factor) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i][j][e] *= factor;
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
    int segment, k, left;  // columns of A that are left

    LORA_EXT_DEVICE explicit Position(const Product<T>& params) { begin(params, 0); }
    LORA_EXT_DEVICE void begin(const Product<T>& params, int at) {
      segment = at, k = 0;
      left = at < params.count ? static_cast<int>(params.segments[at].a.columns) : 0;
    }
    // Whether that ends a segment.
    LORA_EXT_DEVICE bool advance(const Product<T>& params) {
      k += Shape::kK, left -= Shape::kK;
      if (left > 0) return false;
      begin(params, segment + 1);
      return true;
    }
  };

  // What a thread copies of each step.
  class Loading {
   public:
    LORA_EXT_DEVICE Loading(const Product<T>& params, TileCorner tile, int thread)
        : params_(params),
          tile_(tile),
          thread_(thread),
          at_(params),
          a_(copies_of_a()),
          b_(copies_of_b()) {}

    LORA_EXT_DEVICE void step(uint8_t* stage) {
      if (at_.segment == params_.count) return;
      if (params_.aligned) {
        const uint32_t shared = arch::shared_address(stage);
        a_.start(shared);
        b_.start(shared + TileA::kBytes);
      } else {
        const Segment<T>& segment = params_.segments[at_.segment];
        TileA::template load_elements<Shape::kThreads>(stage, segment.a, tile_.m, at_.k, thread_);
        TileB::template load_elements<Shape::kThreads>(stage + TileA::kBytes, segment.b,
                                                       kColumns ? tile_.n : at_.k,
                                                       kColumns ? at_.k : tile_.n, thread_);
      }
      if (!at_.advance(params_)) {
        a_.advance_columns();
        kColumns ? b_.advance_columns() : b_.advance_rows();
      } else if (at_.segment < params_.count) {
        a_ = copies_of_a(), b_ = copies_of_b();
      }
    }

   private:
    static constexpr bool kColumns = kLayout == BLayout::kColumns;
    using CopiesA = typename TileA::template Copies<Shape::kThreads, T>;
    using CopiesB = typename TileB::template Copies<Shape::kThreads, T>;

    // Of the segment that begins.
    LORA_EXT_DEVICE CopiesA copies_of_a() const {
      return {params_.segments[at_.segment].a, tile_.m, 0, thread_};
    }
    LORA_EXT_DEVICE CopiesB copies_of_b() const {
      return {params_.segments[at_.segment].b, kColumns ? tile_.n : 0, kColumns ? 0 : tile_.n,
              thread_};
    }

    const Product<T>& params_;
    TileCorner tile_;
    int thread_;
    Position at_;
    CopiesA a_;
    CopiesB b_;
  };

  // sums += the product of one stage, of which `depth` columns of A are left: a low-rank segment
  // needs no more steps than its rank
  LORA_EXT_DEVICE static void multiply(WarpSums<Shape>& sums, uint32_t stage, int depth,
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
  const TileCorner tile = TileWalk<Shape>::tile(params.N);
  const auto following = [](int offset) {
    return offset + Shape::kStageBytes < Shape::kSharedBytes ? offset + Shape::kStageBytes : 0;
  };

  WarpSums<Shape> sums;
  sums.clear();
  typename P::Loading loading(params, tile, thread);
  typename P::Position multiplying(params);
#pragma unroll
  for (int s = 0; s < Shape::kRing - 1; ++s) {
    loading.step(shared + s * Shape::kStageBytes);
    arch::cp_async_commit();
  }
  // Bytes before the stage that is multiplied, and before the one that is filled.
  int full = 0, free = (Shape::kRing - 1) * Shape::kStageBytes;
  while (multiplying.segment < params.count) {
    arch::cp_async_wait<Shape::kRing - 2>();
    __syncthreads();  // the stage has arrived for every thread, and every thread is done with the
                      // last
    loading.step(shared + free);
    arch::cp_async_commit();
    P::multiply(sums, arch::shared_address(shared + full), multiplying.left, warp_row, warp_column,
                lane);
    free = full, full = following(full);
    const bool ends = multiplying.advance(params);
    if constexpr (kScaled<T>) {
      if (ends && multiplying.segment == params.scaled) sums.multiply_by(back_of(params.back));
    }
    if (ends && multiplying.segment == params.masked) {
      const int64_t row = tile.m + warp_row, column = tile.n + warp_column;
      if (params.kept.data) {
        sums.drop(params.kept, row, column, lane);
      } else {
        sums.drop(params.dropout.rng(), params.dropout.threshold, row, column, lane);
      }
    }
  }
  P::store(sums, params, tile.m + warp_row, tile.n + warp_column, lane);
}

}  // namespace lora_ext::sm80
