// weight_norm: one pass over the weight, whose sums of squares are parts that a second kernel adds.
#include "sum_parts.h"
#include "update_tile.h"
#include "weight_norm.h"

namespace lora_ext {
namespace {

template <class T, class TA>
struct WeightNormParams {
  WeightNormCall<T, TA> call;
  int64_t column_tiles;
  float* parts;  // [column tiles, N], or by column [row tiles, K]
};

// Two blocks a multiprocessor, so that one may wait for memory.
template <class T, class TA, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    weight_norm_kernel(const __grid_constant__ WeightNormParams<T, TA> params) {
  using Tile = UpdateTile;
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const WeightNormCall<T, TA>& call = params.call;
  const Matrix<T>& weight = call.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t row_tile = blockIdx.x / params.column_tiles;
  const int64_t column_tile = blockIdx.x % params.column_tiles;
  const int64_t first_row = row_tile * Tile::kRows, column = column_tile * Tile::kColumns;
  const int64_t row = first_row + warp * Tile::kWarpRows;  // this warp's first
  const Span<T, kAligned> span{lane, weight.columns - column};

  Raw<T> raw[Tile::kWarpRows] = {};
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    if (row + i >= weight.rows) continue;
    raw[i] = span.load_raw(weight.data + (row + i) * weight.stride + column);
  }
  const int rows = at_most(weight.rows - first_row, Tile::kRows);
  const TA* const B = call.lora_B + first_row * call.rank;
  Tile tile(shared);
  Tile::Sums sums;
  tile.add(sums, raw, call.rank, warp, lane, [&](int first, int ranks) {
    const TA* const A = call.lora_A + first * weight.columns + column;
    tile.fill_right(span, ranks, thread, [&](int rank) { return A + rank * weight.columns; });
    Tile::fill_by_rank<Tile::kRows, Tile::kLeft>(
        tile.left, ranks, thread, [](int item) { return item; },
        [&](int item, int rank) {
          const int n = item < rows ? item : rows - 1;
          return call.scaling * to_float(B[n * call.rank + first + rank]);
        });
  });

  // Beyond the matrix there may be infinity times zero.
  if (!call.by_column) {
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      float square = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (span.inside(e)) square += sums[i][e] * sums[i][e];
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        square += __shfl_xor_sync(0xFFFFFFFFu, square, distance);
      }
      if (lane == i) own = square;
    }
    if (lane < Tile::kWarpRows && row + lane < weight.rows) {
      params.parts[column_tile * weight.rows + row + lane] = own;
    }
    return;
  }
  __syncthreads();  // the factors are read: the place is for sums over each warp's rows
  auto* const of_warps = reinterpret_cast<float*>(shared);  // [kRowWarps, kEach, 32]
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      if (row + i < weight.rows) square += sums[i][e] * sums[i][e];
    }
    of_warps[(warp * kEach + e) * 32 + lane] = square;
  }
  __syncthreads();
  // Warp w adds elements w of all lanes.
  float square = 0.0f;
#pragma unroll
  for (int w = 0; w < kRowWarps; ++w) square += of_warps[(w * kEach + warp) * 32 + lane];
  if (span.inside(warp)) {
    params.parts[row_tile * weight.columns + column + span.column(warp)] = square;
  }
}

}  // namespace

template <class T, class TA>
void run_weight_norm(const WeightNormCall<T, TA>& call, const Allocator& scratch, Stream stream) {
  using Tile = UpdateTile;
  const int64_t N = call.weight.rows, K = call.weight.columns;
  const int64_t row_tiles = ceil_div(N, Tile::kRows), column_tiles = ceil_div(K, Tile::kColumns);
  const int64_t count = call.by_column ? row_tiles : column_tiles;
  const int64_t results = call.by_column ? K : N;
  const bool aligned = rows_aligned(call.weight) && rows_aligned(call.lora_A, K, K);
  const WeightNormParams<T, TA> params{call, column_tiles, scratch.get<float>(count * results)};
  auto* const kernel = aligned ? weight_norm_kernel<T, TA, true> : weight_norm_kernel<T, TA, false>;
  arch::launch_dependent(kernel, flat_grid(row_tiles * column_tiles), kRowThreads,
                         Tile::kSharedBytes, stream, params);
  sum_parts({params.parts, count, results, {call.norms, nullptr}, 1, true}, stream);
}

template void run_weight_norm(const WeightNormCall<Bf16, Bf16>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Bf16, float>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Fp16, Fp16>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Fp16, float>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<float, float>&, const Allocator&, Stream);

}  // namespace lora_ext
