// weight_norm: one pass over the weight, whose sums of squares are parts that a second kernel adds.
#include "sum_parts.h"
#include "weight_norm.h"
#include "weight_norm_tile.h"

namespace lora_ext {
namespace {

// Two blocks a multiprocessor, so that one may wait for memory.
template <class T, class TA, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    weight_norm_kernel(const __grid_constant__ WeightNormParams<T, TA> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  if constexpr (sizeof(T) == 2) {
    if (arch::has_mma()) return norms_by_mma<kAligned>(params, shared);
  }
  norms_in_lanes<kAligned>(params, shared);
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
  constexpr int kSharedBytes =
      sizeof(T) == 2 && UpdateTileSm80<TA>::kSharedBytes > Tile::kSharedBytes
          ? UpdateTileSm80<TA>::kSharedBytes
          : Tile::kSharedBytes;
  arch::launch_dependent(kernel, flat_grid(row_tiles * column_tiles), kRowThreads, kSharedBytes,
                         stream, params);
  sum_parts({params.parts, count, results, {call.norms, nullptr}, 1, true}, stream);
}

template void run_weight_norm(const WeightNormCall<Bf16, Bf16>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Bf16, float>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Fp16, Fp16>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<Fp16, float>&, const Allocator&, Stream);
template void run_weight_norm(const WeightNormCall<float, float>&, const Allocator&, Stream);

}  // namespace lora_ext
