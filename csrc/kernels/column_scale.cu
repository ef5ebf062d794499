// column_scale: one pass over z forward, and one over dy and z backward, whose sums over rows are
// parts that a second kernel adds.
#include "column_scale.h"
#include "span.h"
#include "sum_parts.h"

namespace lora_ext {
namespace {

constexpr int kRows = 64;        // of a block at least; a warp has every eighth of them
constexpr int kMostRows = 1024;  // of a block at most: no thread adds more than 128 numbers
// Rows of a warp that are loaded before the first is needed: fewer where they take more registers.
template <class T, bool kAligned>
constexpr int kRowsAtOnce = kAligned && sizeof(T) == 2 ? 4 : 2;
constexpr int kBlocks = 8;  // a multiprocessor, for the whole of backward: two at a time
constexpr int kSums = 2;    // of dy * z, and of dy

template <class T>
struct ColumnScaleParams {
  ColumnScaleCall<T> call;
  int64_t column_tiles;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    column_scale_kernel(const __grid_constant__ ColumnScaleParams<T> params) {
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const ColumnScaleCall<T>& call = params.call;
  const auto [z, M, N, stride] = call.z;
  constexpr int kAtOnce = kRowsAtOnce<T, kAligned>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const FlatTile tile(params.column_tiles);
  const int64_t column = tile.column * kSpan, begin = tile.row * kRows;
  const int64_t end = M - begin < kRows ? M : begin + kRows;
  const Span<T, kAligned> span{lane, N - column};
  if (begin + warp >= end) return;
  float scale[kEach], bias[kEach] = {};
  span.load(call.scale + column, scale);
  if (call.bias) span.load(call.bias + column, bias);
  for (int64_t row = begin + warp; row < end; row += kAtOnce * kRowWarps) {
    Raw<T> raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = row + i * kRowWarps;
      if (at < end) raw[i] = span.load_raw(z + at * stride + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = row + i * kRowWarps;
      if (at >= end) continue;
      float values[kEach];
      widen(raw[i], values);
#pragma unroll
      for (int e = 0; e < kEach; ++e) values[e] = values[e] * scale[e] + bias[e];
      span.store(call.y + at * N + column, values);
    }
  }
}

template <class T>
struct ColumnScaleBackwardParams {
  ColumnScaleBackwardCall<T> call;
  int64_t column_tiles, rows_per_block;
  float* parts;  // [blocks of rows, kSums, N]; null if none is wanted
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 2)
    column_scale_backward_kernel(const __grid_constant__ ColumnScaleBackwardParams<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const ColumnScaleBackwardCall<T>& call = params.call;
  const Matrix<T>&dy = call.dy, &z = call.z;
  constexpr int kAtOnce = kRowsAtOnce<T, kAligned>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const FlatTile tile(params.column_tiles);
  const int64_t column = tile.column * kSpan, row_block = tile.row;
  const int64_t rows = params.rows_per_block, begin = row_block * rows;
  const int64_t end = dy.rows - begin < rows ? dy.rows : begin + rows;
  const Span<T, kAligned> span{lane, dy.columns - column};
  float scale[kEach], sums[kSums][kEach] = {};
  span.load(call.scale + column, scale);
  for (int64_t row = begin + warp; row < end; row += kAtOnce * kRowWarps) {
    Raw<T> dy_raw[kAtOnce], z_raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = row + i * kRowWarps;
      if (at >= end) continue;
      dy_raw[i] = span.load_raw(dy.data + at * dy.stride + column);
      if (z.data) z_raw[i] = span.load_raw(z.data + at * z.stride + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = row + i * kRowWarps;
      if (at >= end) continue;
      float values[kEach];
      widen(dy_raw[i], values);
#pragma unroll
      for (int e = 0; e < kEach; ++e) sums[1][e] += values[e];
      if (z.data) {
        float factors[kEach];
        widen(z_raw[i], factors);
#pragma unroll
        for (int e = 0; e < kEach; ++e) sums[0][e] += values[e] * factors[e];
      }
      if (!call.dz) continue;
#pragma unroll
      for (int e = 0; e < kEach; ++e) values[e] *= scale[e];
      span.store(call.dz + at * dy.columns + column, values);
    }
  }
  if (!params.parts) return;
  auto* const of_warps = reinterpret_cast<float*>(shared);  // [kSums, kRowWarps, kEach, 32]
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      of_warps[((which * kRowWarps + warp) * kEach + e) * 32 + lane] = sums[which][e];
    }
  }
  __syncthreads();
  // Warp w adds elements w of all lanes.
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) {
      sum += of_warps[((which * kRowWarps + w) * kEach + warp) * 32 + lane];
    }
    if (span.inside(warp)) {
      params.parts[(row_block * kSums + which) * dy.columns + column + span.column(warp)] = sum;
    }
  }
}

}  // namespace

template <class T>
void run_column_scale(const ColumnScaleCall<T>& call, Stream stream) {
  const int64_t M = call.z.rows, N = call.z.columns, column_tiles = ceil_div(N, kSpan);
  const ColumnScaleParams<T> params{call, column_tiles};
  const bool aligned = rows_aligned(call.z) && rows_aligned(call.y, N, N);
  auto* const kernel = aligned ? column_scale_kernel<T, true> : column_scale_kernel<T, false>;
  arch::launch_dependent(kernel, flat_grid(column_tiles * ceil_div(M, kRows)), kRowThreads, 0,
                         stream, params);
}

template <class T>
void run_column_scale_backward(const ColumnScaleBackwardCall<T>& call, const Allocator& scratch,
                               Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, column_tiles = ceil_div(N, kSpan);
  const int64_t wanted = larger(1, kBlocks * int64_t{arch::multiprocessors()} / column_tiles);
  const int64_t rows =
      smaller(kMostRows, round_up(ceil_div(M, smaller(wanted, ceil_div(M, kRows))), kRows));
  const int64_t row_blocks = ceil_div(M, rows);
  const bool sums = call.dscale || call.dbias;
  const ColumnScaleBackwardParams<T> params{
      call, column_tiles, rows, sums ? scratch.get<float>(row_blocks * kSums * N) : nullptr};
  constexpr int kSharedBytes = kSums * kRowWarps * kSpan * int{sizeof(float)};
  const bool aligned = rows_aligned(call.dy) && (!call.z.data || rows_aligned(call.z)) &&
                       (!call.dz || rows_aligned(call.dz, N, N));
  auto* const kernel =
      aligned ? column_scale_backward_kernel<T, true> : column_scale_backward_kernel<T, false>;
  arch::launch_dependent(kernel, flat_grid(column_tiles * row_blocks), kRowThreads,
                         sums ? kSharedBytes : 0, stream, params);
  if (sums) {
    sum_parts({params.parts, row_blocks, N, {call.dscale, call.dbias}, kSums, false}, stream);
  }
}

#define LORA_EXT_COLUMN_SCALE(T)                                                               \
  template void run_column_scale(const ColumnScaleCall<T>&, Stream);                           \
  template void run_column_scale_backward(const ColumnScaleBackwardCall<T>&, const Allocator&, \
                                          Stream)
LORA_EXT_COLUMN_SCALE(Bf16);
LORA_EXT_COLUMN_SCALE(Fp16);
LORA_EXT_COLUMN_SCALE(float);

}  // namespace lora_ext
