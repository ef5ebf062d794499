// lora_embedding: one pass over y, whose rows of W and columns of lora_A are gathered.
#include "lora_embedding.h"
#include "update_tile.h"

namespace lora_ext {
namespace {

template <class T, class TA>
struct EmbeddingParams {
  EmbeddingCall<T, TA> call;
  int64_t column_tiles;
};

// Two blocks a multiprocessor, so that one may wait for memory.
template <class T, class TA, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    lora_embedding_kernel(const __grid_constant__ EmbeddingParams<T, TA> params) {
  using Tile = UpdateTile;
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const EmbeddingCall<T, TA>& call = params.call;
  const Matrix<T>& weight = call.weight;
  const int64_t V = weight.rows, D = weight.columns;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const FlatTile of_grid(params.column_tiles);
  const int64_t first_row = of_grid.row * Tile::kRows, column = of_grid.column * Tile::kColumns;
  const int64_t row = first_row + warp * Tile::kWarpRows;  // this warp's first
  const Span<T, kAligned> span{lane, D - column};

  const int rows = at_most(call.M - first_row, Tile::kRows);
  const int columns = at_most(span.left, Tile::kColumns);
  auto* const tokens = reinterpret_cast<int64_t*>(shared + Tile::kSharedBytes);  // [kRows]
  if (thread < rows) {
    const int64_t token = call.tokens[first_row + thread];
    arch::require(token >= 0 && token < V, "lora_embedding: indices: index out of range");
    tokens[thread] = token;
  }
  __syncthreads();

  Raw<T> raw[Tile::kWarpRows] = {};
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    if (row + i >= call.M) continue;
    const int64_t token = tokens[warp * Tile::kWarpRows + i];
    raw[i] = span.load_raw(weight.data + token * weight.stride + column);
  }
  const TA* const B = call.lora_B + column * call.rank;
  Tile tile(shared);
  Tile::Sums sums;
  tile.add(sums, raw, call.rank, warp, lane, [&](int first, int ranks) {
    Tile::fill_by_rank<Tile::kColumns, Tile::kRight>(
        tile.right, ranks, thread,
        [&](int item) { return Tile::place(span, static_cast<unsigned>(item)); },
        [&](int item, int rank) {
          return to_float(B[(item < columns ? item : columns - 1) * call.rank + first + rank]);
        });
    const TA* const A = call.lora_A + first * V;
    Tile::fill_by_rank<Tile::kRows, Tile::kLeft>(
        tile.left, ranks, thread, [](int item) { return item; },
        [&](int item, int rank) {
          const int64_t token = tokens[item < rows ? item : rows - 1];
          return call.scaling * to_float(A[rank * V + token]);
        });
  });
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    if (row + i < call.M) span.store(call.y + (row + i) * D + column, sums[i]);
  }
}

}  // namespace

template <class T, class TA>
void run_lora_embedding(const EmbeddingCall<T, TA>& call, Stream stream) {
  using Tile = UpdateTile;
  const int64_t D = call.weight.columns, column_tiles = ceil_div(D, Tile::kColumns);
  const int64_t row_tiles = ceil_div(call.M, Tile::kRows);
  const EmbeddingParams<T, TA> params{call, column_tiles};
  const bool aligned = rows_aligned(call.weight) && rows_aligned(call.y, D, D);
  auto* const kernel =
      aligned ? lora_embedding_kernel<T, TA, true> : lora_embedding_kernel<T, TA, false>;
  constexpr int kSharedBytes = Tile::kSharedBytes + Tile::kRows * int{sizeof(int64_t)};
  arch::launch_dependent(kernel, flat_grid(row_tiles * column_tiles), kRowThreads, kSharedBytes,
                         stream, params);
}

template void run_lora_embedding(const EmbeddingCall<Bf16, Bf16>&, Stream);
template void run_lora_embedding(const EmbeddingCall<Bf16, float>&, Stream);
template void run_lora_embedding(const EmbeddingCall<Fp16, Fp16>&, Stream);
template void run_lora_embedding(const EmbeddingCall<Fp16, float>&, Stream);
template void run_lora_embedding(const EmbeddingCall<float, float>&, Stream);

}  // namespace lora_ext
