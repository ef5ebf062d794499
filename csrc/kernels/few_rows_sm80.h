// y of up to 64 rows without dropout, as in decoding, in one kernel. A block has a few columns of y
// and reads their rows of the weight once, with x and lora_A beside them: making h again in every
// block spares the kernels that would hand it over. On sm_90a, whose L2 is too slow to bring all of
// x to each multiprocessor, four blocks are a cluster: each has a quarter of x's columns for four
// times as many columns of y, and reads the others' sums from their shared memory.
#pragma once

#include "few_rows_shape_sm80.h"
#include "lora_linear_passes.h"
#include "tile_sm80.h"

namespace lora_ext::sm80 {

template <class T, class TA>
struct FewRowsParams {
  Matrix<T> x, weight;  // [M, K], [N, K]
  const float* bias;    // [N] or null
  const TA *lora_A, *lora_B;
  int r;
  int columns;  // of y that a cluster makes
  FewRowsSizes sizes;
  HiddenFactor scaling;
  T* y;      // [M, N]
  float* h;  // [M, r] or null
};

template <class T, class TA, class Shape>
class FewRows {
 public:
  using Params = FewRowsParams<T, TA>;

  LORA_EXT_DEVICE FewRows(const Params& params, uint8_t* shared)
      : params_(params),
        shared_(shared),
        M_(static_cast<int>(params.x.rows)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        group_(thread_ / 32 % Shape::kGroups),
        depth_(thread_ / 32 / Shape::kGroups),
        rank_(static_cast<int>(blockIdx.x) % Shape::kSplits),
        first_(int64_t{blockIdx.x / Shape::kSplits} * params.columns),
        y_tiles_(params.columns / 8, group_),
        h_tiles_((params.r + 7) / 8, group_),
        x_(params.x.data, params.x.stride, M_, thread_),
        weight_(params.weight.data + first_ * params.weight.stride, params.weight.stride,
                columns_here(), thread_),
        A_(params.lora_A, params.x.columns, params.r, thread_) {}

  LORA_EXT_DEVICE void run() {
    sum();
    arch::cp_async_wait<0>();
    __syncthreads();  // the ring becomes room for sums
    store(sums_of_h_, h_tiles_, h_at(depth_), params_.sizes.h_stride);
    __syncthreads();
    add_low_rank();
    store(sums_of_y_, y_tiles_, y_at(depth_), params_.sizes.y_stride);
    all_have_stored();
    if (blockIdx.x < Shape::kSplits && params_.h != nullptr) write_h();
    write_y();
    if constexpr (Shape::kSplits > 1) arch::cluster_sync();  // others may still read from this one
  }

 private:
  static constexpr int kRowTiles = Shape::kRows / 16;
  static constexpr bool kMixed = sizeof(TA) == sizeof(float);
  // Of h and lora_B, which come from floats here: of fp16 they are two bf16, with all exponents.
  using Low = std::conditional_t<kScaled<T>, Bf16, T>;
  using RowTile = Tile<Shape::kRows, Shape::kStep>;

  // The tiles of 8 columns that this warp's group has of `all`.
  struct Tiles {
    int first, count;
    LORA_EXT_DEVICE Tiles(int all, int group) {
      const int each = (all + Shape::kGroups - 1) / Shape::kGroups;
      first = group * each;
      count = all - first < each ? all - first : each;
    }
  };

  template <int kTiles>
  struct Sums {
    static constexpr int kMost = kTiles;
    arch::FragmentC value[kRowTiles][kTiles] = {};
  };

  // ---- Copies ----------------------------------------------------------------------------------

  // What this thread copies of each step: 16 bytes of every so many rows.
  template <class E, int kMost>
  struct Rows {
    static constexpr int kVector = 16 / sizeof(E), kChunks = Shape::kStep / kVector;
    static constexpr int kApart = Shape::kThreads / kChunks;

    const E* first;
    int64_t next;  // elements to the next row of this thread
    int count;     // of rows from its first one on
    int column;
    uint32_t to;

    LORA_EXT_DEVICE Rows(const E* matrix, int64_t stride, int rows, int thread)
        : first(matrix + thread / kChunks * stride),
          next(kApart * stride),
          count(rows - thread / kChunks),
          column(thread % kChunks * kVector),
          to(offset<E>(thread / kChunks, thread % kChunks)) {}

    // Starts to copy them from column k on; zero beyond the last column. Rows that are not there
    // are left as they are: what is made of them is not stored.
    LORA_EXT_DEVICE void copy(uint32_t tile, int k, int columns) const {
      const bool inside = k + column < columns;
      const E* from = first + (inside ? k + column : 0);
#pragma unroll
      for (int i = 0; i * kApart < kMost; ++i) {
        if (i * kApart < count) {
          arch::cp_async_16(tile + to + i * kApart * Shape::kStep * sizeof(E), from,
                            inside ? 16 : 0);
        }
        from += next;
      }
    }
  };

  // Where 16 bytes of a row lie, as Tile has them; of a row of floats, which is twice as long, so
  // that the pairs of eight rows lie in different banks.
  template <class E>
  LORA_EXT_DEVICE static uint32_t offset(int row, int chunk) {
    if constexpr (sizeof(E) == 2) return RowTile::offset(row, chunk);
    return static_cast<uint32_t>(row * Shape::kStep * 4 + ((chunk ^ (row & 7) * 2) << 4));
  }

  LORA_EXT_DEVICE int columns_here() const {
    const int64_t left = params_.weight.rows - first_;
    return left < params_.columns ? static_cast<int>(left) : params_.columns;
  }

  LORA_EXT_DEVICE void load(uint32_t stage, int k) const {
    const int K = static_cast<int>(params_.x.columns);
    x_.copy(stage, k, K);
    weight_.copy(stage + Shape::kWeightAt, k, K);
    A_.copy(stage + params_.sizes.A_at, k, K);
  }

  // ---- Sums ------------------------------------------------------------------------------------

  // x W^T and x A^T of this warp's columns, of its parts of K.
  LORA_EXT_DEVICE void sum() {
    const int K = static_cast<int>(params_.x.columns);
    const int all = (K + Shape::kStep - 1) / Shape::kStep;
    const int steps = (all - rank_ + Shape::kSplits - 1) / Shape::kSplits;
    const auto k_of = [&](int step) { return (step * Shape::kSplits + rank_) * Shape::kStep; };
    const uint32_t ring = arch::shared_address(shared_);
    const int bytes = params_.sizes.step_bytes;
    const auto stage = [&](int step) {
      return ring + static_cast<uint32_t>(step % Shape::kRing * bytes);
    };
#pragma unroll
    for (int step = 0; step < Shape::kRing - 1; ++step) {
      if (step < steps) load(stage(step), k_of(step));
      arch::cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      arch::cp_async_wait<Shape::kRing - 2>();
      __syncthreads();  // the stage has arrived for every thread, and every thread is done with
                        // the last
      const int next = step + Shape::kRing - 1;
      if (next < steps) load(stage(next), k_of(next));
      arch::cp_async_commit();
      multiply(stage(step));
    }
  }

  LORA_EXT_DEVICE void multiply(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Shape::kStep / 16 / Shape::kDepths; ++i) {
      const int k = (i * Shape::kDepths + depth_) * 16;
      arch::FragmentA x[kRowTiles];
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) load_a<RowTile>(x[row], stage, row * 16, k, lane_);
      multiply(sums_of_y_, x, y_tiles_, stage + Shape::kWeightAt, k);
      if constexpr (kMixed) {
        multiply_floats(x, params_.sizes.A_at + (stage - arch::shared_address(shared_)), k);
      } else {
        multiply(sums_of_h_, x, h_tiles_, stage + params_.sizes.A_at, k);
      }
    }
  }

  template <class Of>
  LORA_EXT_DEVICE void multiply(Of& sums, const arch::FragmentA (&x)[kRowTiles], Tiles tiles,
                                uint32_t tile, int k) const {
#pragma unroll
    for (int t = 0; t < Of::kMost; t += 2) {
      if (t >= tiles.count) break;
      arch::FragmentB b[2];  // the second may be the next group's, or of nobody
      load_b<RowTile>(b, tile, k, (tiles.first + t) * 8, lane_);
      multiply(sums, x, t, b[0]);
      if (t + 1 < tiles.count) multiply(sums, x, t + 1, b[1]);
    }
  }

  // A of floats: their rounding, and what that leaves; of fp16 as bf16, since fp16 has no exponents
  // for it.
  LORA_EXT_DEVICE void multiply_floats(const arch::FragmentA (&x)[kRowTiles], uint32_t at, int k) {
    arch::FragmentA low[kRowTiles];
    for_rest(x, low);
#pragma unroll
    for (int t = 0; t < Shape::kRankTiles; ++t) {
      if (t >= h_tiles_.count) break;
      const int row = (h_tiles_.first + t) * 8 + lane_ / 4;
      arch::FragmentB value, rest;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = k + i * 8 + lane_ % 4 * 2;
        const auto* pair = reinterpret_cast<const float*>(
            shared_ + at + offset<float>(row, column / 4) + column % 4 * 4);
        split<T, Low>(pair[0], pair[1], value[i], rest[i]);
      }
      multiply(sums_of_h_, x, t, value);
      multiply<Low>(sums_of_h_, low, t, rest);
    }
  }

  template <class E = T, class Of>
  LORA_EXT_DEVICE static void multiply(Of& sums, const arch::FragmentA (&x)[kRowTiles], int tile,
                                       const arch::FragmentB& b) {
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
      arch::mma_m16n8k16<E>(sums.value[row][tile], x[row], b);
    }
  }

  // x beside such a rest.
  LORA_EXT_DEVICE static void for_rest(const arch::FragmentA (&x)[kRowTiles],
                                       arch::FragmentA (&low)[kRowTiles]) {
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[row][i] = kScaled<T> ? pack_pair<Low>(first_of<T>(x[row][i]), second_of<T>(x[row][i]))
                                 : x[row][i];
      }
    }
  }

  template <class E, class Rest = E>
  LORA_EXT_DEVICE static void split(float first, float second, uint32_t& value, uint32_t& rest) {
    value = pack_pair<E>(first, second);
    rest =
        pack_pair<Rest>(left_of(first, first_of<E>(value)), left_of(second, second_of<E>(value)));
  }
  // What rounding left; of what became infinite nothing.
  LORA_EXT_DEVICE static float left_of(float full, float near) {
    const float left = full - near;
    return left - left == 0.0f ? left : 0.0f;
  }

  // ---- The low-rank part -----------------------------------------------------------------------

  // s h B^T, of what this block has of h: B's columns that are this warp's part.
  LORA_EXT_DEVICE void add_low_rank() {
    const float scaling = params_.scaling.get();
    for (int j = depth_ * 16; j < params_.r; j += Shape::kDepths * 16) {
      arch::FragmentA value[kRowTiles], rest[kRowTiles];
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = row * 16 + lane_ / 4 + i % 2 * 8, at = j + lane_ % 4 * 2 + i / 2 * 8;
          split<Low>(scaling * h_of_block(m, at), scaling * h_of_block(m, at + 1), value[row][i],
                     rest[row][i]);
        }
      }
#pragma unroll
      for (int t = 0; t < Shape::kColumnTiles; ++t) {
        if (t >= y_tiles_.count) break;
        const int64_t n = first_ + (y_tiles_.first + t) * 8 + lane_ / 4;
        arch::FragmentB b, b_rest;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = j + lane_ % 4 * 2 + i * 8;
          split<Low>(B_of(n, at), B_of(n, at + 1), b[i], b_rest[i]);
        }
        multiply<Low>(sums_of_y_, value, t, b);
        multiply<Low>(sums_of_y_, rest, t, b);
        if constexpr (kMixed || kScaled<T>) multiply<Low>(sums_of_y_, value, t, b_rest);
      }
    }
  }

  LORA_EXT_DEVICE float h_of_block(int m, int j) const {
    float sum = 0.0f;
#pragma unroll
    for (int depth = 0; depth < Shape::kDepths; ++depth) {
      sum += j < params_.r ? h_at(depth)[m * params_.sizes.h_stride + j] : 0.0f;
    }
    return sum;
  }
  LORA_EXT_DEVICE float B_of(int64_t n, int j) const {
    const bool inside = n < params_.weight.rows && j < params_.r;
    return inside ? to_float(params_.lora_B[n * params_.r + j]) : 0.0f;
  }

  // ---- Sums of all warps -----------------------------------------------------------------------

  LORA_EXT_DEVICE float* h_at(int depth) const {
    return reinterpret_cast<float*>(shared_) + depth * Shape::kRows * params_.sizes.h_stride;
  }
  LORA_EXT_DEVICE float* y_at(int depth) const {
    return h_at(Shape::kDepths) + depth * Shape::kRows * params_.sizes.y_stride;
  }

  template <class Of>
  LORA_EXT_DEVICE void store(const Of& sums, Tiles tiles, float* to, int stride) const {
#pragma unroll
    for (int t = 0; t < Of::kMost; ++t) {
      if (t >= tiles.count) break;
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const pair = to + (row * 16 + half * 8 + lane_ / 4) * stride +
                              (tiles.first + t) * 8 + lane_ % 4 * 2;
          pair[0] = sums.value[row][t][half * 2], pair[1] = sums.value[row][t][half * 2 + 1];
        }
      }
    }
  }

  LORA_EXT_DEVICE static void all_have_stored() {
    if constexpr (Shape::kSplits > 1) {
      arch::cluster_sync_stores();
    } else {
      __syncthreads();
    }
  }

  // Of an element of the sums: those of all blocks and warps, in their order.
  LORA_EXT_DEVICE static float added(const float* first, int apart) {
    float sum = 0.0f;
#pragma unroll
    for (int split = 0; split < Shape::kSplits; ++split) {
      if constexpr (Shape::kSplits > 1) {
        const uint32_t there = arch::cluster_address(arch::shared_address(first), split);
#pragma unroll
        for (int depth = 0; depth < Shape::kDepths; ++depth) {
          sum += arch::cluster_load_float(there + static_cast<uint32_t>(depth * apart * 4));
        }
      } else {
#pragma unroll
        for (int depth = 0; depth < Shape::kDepths; ++depth) sum += first[depth * apart];
      }
    }
    return sum;
  }

  LORA_EXT_DEVICE void write_h() const {
    const int stride = params_.sizes.h_stride, step = Shape::kSplits * Shape::kThreads;
    for (int i = rank_ * Shape::kThreads + thread_; i < M_ * params_.r; i += step) {
      const int row = i / params_.r, j = i % params_.r;
      params_.h[i] = added(h_at(0) + row * stride + j, Shape::kRows * stride);
    }
  }

  // Each block of a cluster has a part of its columns.
  LORA_EXT_DEVICE void write_y() const {
    const int stride = params_.sizes.y_stride, share = params_.columns / Shape::kSplits;
    const int64_t N = params_.weight.rows;
    for (int i = thread_; i < M_ * share; i += Shape::kThreads) {
      const int row = i / share, column = rank_ * share + i % share;
      const int64_t n = first_ + column;
      if (n >= N) continue;
      const float sum = added(y_at(0) + row * stride + column, Shape::kRows * stride);
      const float bias = params_.bias != nullptr ? params_.bias[n] : 0.0f;
      params_.y[row * N + n] = rounded<T>(sum + bias);
    }
  }

  const Params& params_;
  uint8_t* const shared_;
  const int M_, thread_, lane_, group_, depth_, rank_;
  const int64_t first_;  // column of y
  const Tiles y_tiles_, h_tiles_;
  const Rows<T, Shape::kRows> x_;
  const Rows<T, Shape::kMostColumns> weight_;
  const Rows<TA, Shape::kMostRank> A_;
  Sums<Shape::kColumnTiles> sums_of_y_;
  Sums<Shape::kRankTiles> sums_of_h_;
};

template <class T, class TA, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kLeastBlocks)
    few_rows_sm80_kernel(const __grid_constant__ FewRowsParams<T, TA> params) {
#if defined(LORA_EXT_SM90A)
  constexpr bool kHere = true;
#else
  constexpr bool kHere = Shape::kSplits == 1;
#endif
  if constexpr (kHere) {
    LORA_EXT_DYNAMIC_SHARED(shared);
    arch::wait_for_previous_kernel();
    arch::let_next_kernel_start();
    FewRows<T, TA, Shape>(params, shared).run();
  }
}

}  // namespace lora_ext::sm80
