// y of a few rows without dropout, as in decoding, in one kernel. A block has a few columns of y
// and reads their rows of the weight once, with all of x and lora_A beside them: these are small,
// and making h again in every block spares the kernels that would hand it over. Warps have every
// eighth part of 32 columns of x, and their sums are added in a fixed order.
#pragma once

#include <algorithm>

#include "arch/arch.h"
#include "elementwise.h"
#include "lora_linear_passes.h"

namespace lora_ext::sm80 {

template <class T, class TA>
struct FewRowsParams {
  Matrix<T> x, weight;  // [M, K], [N, K]
  const float* bias;    // [N] or null
  const TA *lora_A, *lora_B;
  int r;
  HiddenFactor scaling;
  T* y;      // [M, N]
  float* h;  // [M, r] or null
};

template <int kColumnTiles, int kRankTiles>
struct FewRowsShape {
  static constexpr int kRows = 16, kColumns = 8 * kColumnTiles, kRank = 8 * kRankTiles;
  static constexpr int kAll = kColumns + kRank;  // columns of the sums: y's, then h's
  static constexpr int kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kStep = 32;  // of K, for a warp
  static constexpr int kSharedBytes = (kWarps * kRows * kAll + kRows * kRank) * 4;
  static_assert(kSharedBytes <= 48 * 1024);
};

template <class T, class TA, class Shape>
struct FewRows {
  // Eight neighbouring 16-bit elements of a row; the products take four at a time, so that lane t
  // of a row has elements 8 t to 8 t + 7 of 32 as those that FragmentA and FragmentB want of 2
  // x 16.
  struct alignas(16) Chunk {
    uint32_t pairs[4];
  };

  LORA_EXT_DEVICE static Chunk load(const T* values, bool inside) {
    return inside ? *reinterpret_cast<const Chunk*>(values) : Chunk{};
  }

  // Of a float matrix: the value, rounded, and what rounding left.
  LORA_EXT_DEVICE static void load(const float* values, bool inside, Chunk& value, Chunk& rest) {
    value = rest = Chunk{};
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = values[2 * i], second = values[2 * i + 1];
      value.pairs[i] = pack_pair<T>(first, second);
      rest.pairs[i] =
          pack_pair<T>(first - first_of<T>(value.pairs[i]), second - second_of<T>(value.pairs[i]));
    }
  }

  LORA_EXT_DEVICE static void multiply(arch::FragmentC& sums, const Chunk& upper,
                                       const Chunk& lower, const Chunk& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = half * 2;
      const arch::FragmentA rows = {upper.pairs[at], lower.pairs[at], upper.pairs[at + 1],
                                    lower.pairs[at + 1]};
      const arch::FragmentB columns = {b.pairs[at], b.pairs[at + 1]};
      arch::mma_m16n8k16<T>(sums, rows, columns);
    }
  }

  // The sums of this warp, to its part of shared memory.
  LORA_EXT_DEVICE static void sum(const FewRowsParams<T, TA>& params, int64_t column, int warp,
                                  int lane, float* out) {
    constexpr int kColumnTiles = Shape::kColumns / 8, kTiles = Shape::kAll / 8;
    const int64_t M = params.x.rows, K = params.x.columns, N = params.weight.rows;
    const int own = lane / 4;
    arch::FragmentC sums[kTiles] = {};
#pragma unroll 2
    for (int64_t first = warp * Shape::kStep; first < K; first += Shape::kWarps * Shape::kStep) {
      const int64_t k = first + lane % 4 * 8;
      const bool inside = k < K;
      const T* const x = params.x.data + own * params.x.stride + k;
      const Chunk upper = load(x, inside && own < M);
      const Chunk lower = load(x + 8 * params.x.stride, inside && own + 8 < M);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        const int64_t n = column + tile * 8 + own;
        const T* const weight = params.weight.data + n * params.weight.stride + k;
        multiply(sums[tile], upper, lower, load(weight, inside && n < N));
      }
#pragma unroll
      for (int tile = 0; tile < Shape::kRank / 8; ++tile) {
        const int j = tile * 8 + own;
        const TA* const A = params.lora_A + j * K + k;
        auto& h = sums[kColumnTiles + tile];
        if constexpr (std::is_same_v<T, TA>) {
          multiply(h, upper, lower, load(A, inside && j < params.r));
        } else {
          Chunk value, rest;
          load(A, inside && j < params.r, value, rest);
          multiply(h, upper, lower, value);
          multiply(h, upper, lower, rest);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[(own + i / 2 * 8) * Shape::kAll + tile * 8 + lane % 4 * 2 + i % 2] = sums[tile][i];
      }
    }
  }

  // Of all warps, of one element.
  LORA_EXT_DEVICE static float added(const float* sums, int row, int column) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      sum += sums[(warp * Shape::kRows + row) * Shape::kAll + column];
    }
    return sum;
  }
};

template <class T, class TA, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    few_rows_sm80_kernel(const __grid_constant__ FewRowsParams<T, TA> params) {
  using Pass = FewRows<T, TA, Shape>;
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* const sums = reinterpret_cast<float*>(shared);
  float* const h = sums + Shape::kWarps * Shape::kRows * Shape::kAll;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t column = int64_t{blockIdx.x} * Shape::kColumns;
  const int64_t M = params.x.rows, N = params.weight.rows;
  Pass::sum(params, column, warp, thread % 32, sums + warp * Shape::kRows * Shape::kAll);
  __syncthreads();

  for (int i = thread; i < Shape::kRows * Shape::kRank; i += Shape::kThreads) {
    const int row = i / Shape::kRank, j = i % Shape::kRank;
    h[i] = Pass::added(sums, row, Shape::kColumns + j);
    if (blockIdx.x == 0 && params.h != nullptr && row < M && j < params.r) {
      params.h[row * params.r + j] = h[i];
    }
  }
  __syncthreads();

  for (int i = thread; i < Shape::kRows * Shape::kColumns; i += Shape::kThreads) {
    const int row = i / Shape::kColumns;
    const int64_t n = column + i % Shape::kColumns;
    if (row >= M || n >= N) continue;
    float low_rank = 0.0f;
    for (int j = 0; j < params.r; ++j) {
      low_rank += h[row * Shape::kRank + j] * to_float(params.lora_B[n * params.r + j]);
    }
    const float base = Pass::added(sums, row, i % Shape::kColumns);
    const float bias = params.bias != nullptr ? params.bias[n] : 0.0f;
    params.y[row * N + n] = rounded<T>(base + params.scaling.get() * low_rank + bias);
  }
}

// ---- Launching it ------------------------------------------------------------------------------

template <class T, class TA>
bool takes_few_rows(const ForwardCall<T, TA>& call) {
  const bool aligned = call.x.aligned() && call.weight.stored.aligned() &&
                       call.x.columns % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(call.lora_A) % 16 == 0;
  return few_rows_fit(call.x.rows, call.r, !std::is_same_v<T, TA>, call.dropout.enabled) &&
         aligned && call.weight.stored.data != nullptr && !call.weight.transposed;
}

// Columns of a block: as few rows of x, A and the weight as possible for the busiest
// multiprocessor.
inline int few_rows_columns(int64_t M, int64_t N, int64_t r, int64_t multiprocessors) {
  int best = 0;
  int64_t fewest = 0;
  for (const int columns : {32, 16, 8}) {
    const int64_t turns = ceil_div(ceil_div(N, columns), multiprocessors);
    const int64_t rows = turns * (columns + round_up(r, 8) + M);
    if (best == 0 || rows < fewest) best = columns, fewest = rows;
  }
  return best;
}

template <class T, class TA>
void launch_few_rows(const ForwardCall<T, TA>& call, Stream stream) {
  const FewRowsParams<T, TA> params{.x = call.x,
                                    .weight = call.weight.stored,
                                    .bias = call.bias,
                                    .lora_A = call.lora_A,
                                    .lora_B = call.lora_B,
                                    .r = call.r,
                                    .scaling = {call.scaling, call.scaling_factor},
                                    .y = call.y,
                                    .h = call.h};
  const int64_t N = call.weight.N();
  const auto launch = [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(ceil_div(N, Shape::kColumns)));
    arch::launch_dependent(few_rows_sm80_kernel<T, TA, Shape>, grid, Shape::kThreads,
                           Shape::kSharedBytes, stream, params);
  };
  const auto of_columns = [&](auto rank_tiles) {
    constexpr int kRankTiles = decltype(rank_tiles)::value;
    switch (few_rows_columns(call.x.rows, N, call.r, arch::multiprocessors())) {
      case 32:
        return launch(FewRowsShape<4, kRankTiles>{});
      case 16:
        return launch(FewRowsShape<2, kRankTiles>{});
      default:
        return launch(FewRowsShape<1, kRankTiles>{});
    }
  };
  if (call.r <= 16) return of_columns(std::integral_constant<int, 2>{});
  of_columns(std::integral_constant<int, 4>{});
}

}  // namespace lora_ext::sm80
