// The low-rank passes of the sm_80 family: their grids, tiles and scratch. Host code without torch.
#pragma once

#include "elementwise.h"
#include "lora_linear_elementwise.h"
#include "low_rank_down_grad_sm80.h"
#include "low_rank_up_grad_sm80.h"
#include "rank_groups.h"

namespace lora_ext::sm80 {

template <class T>
void launch_down(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout, const Hidden<T>& h,
                 const Allocator& scratch, Stream stream) {
  const int64_t row_blocks = ceil_div(x.rows, 64), steps = ceil_div(x.columns, 64);
  const int64_t r = A.value.rows;
  const int splits = static_cast<int>(larger(1, smaller(steps, wanted_blocks() / row_blocks)));
  float* const parts = scratch.get<float>(splits * x.rows * r);
  for_each_group<64>(r, [&](int64_t first, int64_t count, auto width) {
    constexpr int kColumns = decltype(width)::value;
    using Shape = DownShape<kColumns>;
    static_assert(Shape::kSharedBytes <= kLeastSharedBytes);
    const DownParams<T> params{.x = x,
                               .A = A.rows(first, count),
                               .aligned = x.aligned(),
                               .dropout = dropout,
                               .splits = splits,
                               .rank = static_cast<int>(count),
                               .stride = static_cast<int>(r),
                               .partial = parts + first};
    const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(splits));
    arch::launch(low_rank_down_sm80_kernel<T, kColumns>, grid, Shape::kThreads, Shape::kSharedBytes,
                 stream, params);
  });
  finish({parts, splits}, h, stream);
}

// By groups of up to kMost ranks.
template <int kMost, class T>
void launch_up_grad_in_groups(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                              Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, r = call.B.value.columns;
  const bool wants_dB = call.h.value.data;
  const int64_t columns_per_block = smaller(round_up(N, 64), kMostUpGradColumns);
  const int64_t column_blocks = ceil_div(N, columns_per_block);
  const int64_t wanted = larger(1, smaller(ceil_div(M, 64), wanted_blocks() / column_blocks));
  const int64_t rows_per_block = round_up(ceil_div(M, wanted), 64);
  const int64_t row_blocks = ceil_div(M, rows_per_block);
  float* const dh = call.wants_dh ? scratch.get<float>(column_blocks * M * r) : nullptr;
  float* const dB = wants_dB ? scratch.get<float>(row_blocks * N * r) : nullptr;
  for_each_group<kMost>(r, [&](int64_t first, int64_t count, auto width) {
    constexpr int kRank = decltype(width)::value;
    const UpGradParams<T> params{.dy = call.dy,
                                 .B = call.B.columns(first, count),
                                 .rank = static_cast<int>(count),
                                 .stride = static_cast<int>(r),
                                 .h = wants_dB ? call.h.columns(first, count) : call.h,
                                 .aligned = call.dy.aligned(),
                                 .rows_per_block = static_cast<int>(rows_per_block),
                                 .columns_per_block = static_cast<int>(columns_per_block),
                                 .dh = dh ? dh + first : nullptr,
                                 .dB = dB ? dB + first : nullptr};
    const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(row_blocks));
    arch::launch(low_rank_up_grad_sm80_kernel<T, kRank>, grid, 128,
                 UpGradShape<kRank>::shared_bytes(params.columns_per_block), stream, params);
  });
  if (dB) left.add({dB, static_cast<int>(row_blocks)}, N * r, call.dB);
  if (dh) finish({dh, static_cast<int>(column_blocks)}, call.dh, stream);
}

// 64 ranks in one pass over dy where their sums fit beside them, else 32. Narrower blocks would
// also fit, but make so many more parts of dh that these outweigh the second pass: for r = 64 and
// columns of 256 or 64 bytes moved are 6 or 10 for each element of dy.
template <class T>
void launch_up_grad(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                    Stream stream) {
  const int columns = static_cast<int>(smaller(round_up(call.dy.columns, 64), kMostUpGradColumns));
  if (UpGradShape<64>::shared_bytes(columns) <= arch::most_shared_bytes()) {
    return launch_up_grad_in_groups<64>(call, left, scratch, stream);
  }
  return launch_up_grad_in_groups<32>(call, left, scratch, stream);
}

template <class T>
void launch_down_grad(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                      const KeptBits& kept, const Gradient<T>& dA, Gradients<T>& left,
                      const Allocator& scratch, Stream stream) {
  const int64_t M = x.rows, K = x.columns, r = dh.value.columns;
  const int64_t column_blocks = ceil_div(K, DownGradShape<16>::kK);
  const int64_t wanted = larger(1, smaller(ceil_div(M, 64), wanted_blocks() / column_blocks));
  const int64_t rows_per_block = round_up(ceil_div(M, wanted), 64);
  const int64_t row_blocks = ceil_div(M, rows_per_block);
  float* const parts = scratch.get<float>(row_blocks * r * K);
  for_each_group<64>(r, [&](int64_t first, int64_t count, auto width) {
    constexpr int kRank = decltype(width)::value;
    static_assert(DownGradShape<kRank>::kSharedBytes <= kLeastSharedBytes);
    DownGradParams<T> params{.x = x,
                             .dh = dh.columns(first, count),
                             .rank = static_cast<int>(count),
                             .stride = static_cast<int>(r),
                             .aligned = x.aligned(),
                             .dropout = dropout,
                             .kept = first == 0 ? kept : KeptBits{},
                             .rows_per_block = static_cast<int>(rows_per_block),
                             .dA = parts + first * K};
    params.dropout.enabled = dropout.drops();
    const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(row_blocks));
    arch::launch(low_rank_down_grad_sm80_kernel<T, kRank>, grid, 128,
                 DownGradShape<kRank>::kSharedBytes, stream, params);
  });
  left.add({parts, static_cast<int>(row_blocks)}, r * K, dA);
}

}  // namespace lora_ext::sm80
