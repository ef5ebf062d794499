// lora_linear on kernels for sm_80 and later: which are launched, on which tiles, with what
// scratch. Host code without torch; `T` is the 16-bit type of the base, `TA` that of the adapters,
// T or float.
#pragma once

#include "elementwise.h"
#include "lora_down_grad_sm80.h"
#include "lora_up_grad_sm80.h"

namespace lora_ext::sm80 {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks that fill any GPU of today about twice.
constexpr int64_t kWantedBlocks = 264;

// An adapter as tensor cores read it: as it is, or packed where it is float or its rows do not
// begin at multiples of 16 bytes.
template <class T>
struct Adapter {
  Matrix<T> value;
  const T* remainder;  // laid out like value; or null

  Matrix<T> rest() const { return {remainder, value.rows, value.columns, value.stride}; }
};

template <class T, class TA>
Adapter<T> adapter(const TA* data, int64_t rows, int64_t columns, const Allocator& scratch,
                   Stream stream) {
  if constexpr (kSame<T, TA>) {
    const Matrix<T> as_it_is{data, rows, columns, columns};
    if (as_it_is.aligned()) return {as_it_is, nullptr};
  }
  const int64_t padded = round_up(columns, 8);
  PackParams<T, TA> pack{data, rows, columns, rows, padded, scratch.get<T>(rows * padded), nullptr};
  if constexpr (!kSame<T, TA>) pack.remainder = scratch.get<T>(rows * padded);
  launch_elements(pack_kernel<T, TA>, rows * padded, stream, pack);
  return {{pack.value, rows, columns, padded}, pack.remainder};
}

// Calls f with the smallest of the tile widths that `columns` fits in, as a constant.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};
template <class F>
void with_width(int64_t columns, const F& f) {
  if (columns <= 16) {
    f(Width<16>{});
  } else if (columns <= 32) {
    f(Width<32>{});
  } else {
    f(Width<64>{});
  }
}
constexpr int kGroup = 64;  // columns of the rank that one launch treats

// partial [splits, M, r] of h = dropout(x) A^T; returns splits.
template <class T>
int down(const Matrix<T>& x, const Adapter<T>& A, int r, const Dropout& dropout, float** partial,
         const Allocator& scratch, Stream stream) {
  const int64_t row_blocks = ceil_div(x.rows, 64), steps = ceil_div(x.columns, 64);
  const int splits = static_cast<int>(larger(1, smaller(steps, kWantedBlocks / row_blocks)));
  *partial = scratch.get<float>(splits * x.rows * r);
  for (int first = 0; first < r; first += kGroup) {
    const int rank = static_cast<int>(smaller(r - first, kGroup));
    with_width(rank, [&](auto width) {
      constexpr int kColumns = decltype(width)::value;
      using Shape = DownShape<kColumns>;
      DownParams<T> params{};
      params.x = x;
      params.lora_A = {A.value.data + first * A.value.stride, rank, A.value.columns,
                       A.value.stride};
      params.A_remainder = A.remainder ? A.remainder + first * A.value.stride : nullptr;
      params.aligned = x.aligned() && params.lora_A.aligned();
      params.dropout = dropout.enabled, params.threshold = dropout.threshold;
      params.rng_state = dropout.rng_state;
      params.splits = splits, params.rank = rank, params.stride = r;
      params.partial = *partial + first;
      const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(row_blocks));
      arch::launch(lora_down_kernel<T, kColumns>, grid, Shape::kThreads, Shape::kSharedBytes,
                   stream, params);
    });
  }
  return splits;
}

// The parts of h or dh, added: into `sums` in float if not null; and rounded, times `scaling`, as
// an operand of the base product's kernel.
template <class T>
Matrix<T> finish(const float* partial, int splits, int64_t M, int r, float survivor, Scale scaling,
                 float* sums, const Allocator& scratch, Stream stream) {
  const int padded = static_cast<int>(round_up(r, 16));
  const FinishDownParams<T> params{
      partial, splits, M, r, padded, survivor, scaling, sums, scratch.get<T>(M * padded)};
  launch_elements(finish_down_kernel<T>, M * padded, stream, params);
  return {params.operand, M, padded, padded};
}

template <class T, BLayout kLayout>
void gemm(GemmParams<T>& params, Stream stream) {
  params.aligned = true;
  for (int s = 0; s < params.count; ++s) {
    params.aligned &= params.segments[s].a.aligned() && params.segments[s].b.aligned();
  }
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(ceil_div(params.N, Shape::kN)),
                    static_cast<unsigned>(ceil_div(params.M, Shape::kM)));
    arch::launch(gemm_kernel<T, Shape, kLayout>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                 params);
  };
  const int64_t large_tiles = ceil_div(params.M, 128) * ceil_div(params.N, 128);
  if (large_tiles >= kWantedBlocks / 2) {
    run(GemmShape<128, 128, 64, 32, 3>{});
  } else {
    run(GemmShape<64, 64, 32, 32, 4>{});
  }
}

template <class T, class TA>
void forward(const ForwardCall<T, TA>& call, const Allocator& scratch, Stream stream) {
  const int64_t M = call.x.rows, K = call.x.columns, N = call.weight.rows;
  const Adapter<T> A = adapter<T>(call.lora_A, call.r, K, scratch, stream);
  const Adapter<T> B = adapter<T>(call.lora_B, N, call.r, scratch, stream);
  float* partial;
  const int splits = down(call.x, A, call.r, call.dropout, &partial, scratch, stream);
  const float survivor = call.dropout.enabled ? call.dropout.scale : 1.0f;
  const Matrix<T> h = finish<T>(partial, splits, M, call.r, survivor,
                                {call.scaling, call.scaling_factor}, call.h, scratch, stream);
  GemmParams<T> params{};
  params.segments[0] = {call.x, call.weight};
  params.segments[1] = {h, B.value};
  params.segments[2] = {h, B.rest()};
  params.count = B.remainder ? 3 : 2;
  params.bias = call.bias, params.out = call.y, params.M = M, params.N = N;
  gemm<T, BLayout::kColumns>(params, stream);
}

template <class T, class TA>
void backward(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns;
  const int64_t K = call.dx ? call.weight.columns : call.x.columns;
  const int r = call.r;
  const float survivor = call.dropout.enabled ? call.dropout.scale : 1.0f;
  const float* h = call.h;
  const Adapter<T> A = adapter<T>(call.lora_A, r, K, scratch, stream);
  if (call.dB && !h) {
    float* partial;
    float* made = scratch.get<float>(M * r);
    const int splits = down(call.x, A, r, call.dropout, &partial, scratch, stream);
    finish<T>(partial, splits, M, r, survivor, {1.0f, nullptr}, made, scratch, stream);
    h = made;
  }

  // dh and dB, in parts
  const Adapter<T> B = adapter<T>(call.lora_B, N, r, scratch, stream);
  const int64_t columns_per_block = smaller(round_up(N, 64), 256);
  const int64_t column_blocks = ceil_div(N, columns_per_block);
  const int64_t row_blocks = larger(1, smaller(ceil_div(M, 64), kWantedBlocks / column_blocks));
  const int64_t rows_per_block = round_up(ceil_div(M, row_blocks), 64);
  const int64_t used_row_blocks = ceil_div(M, rows_per_block);
  float* dh_parts = call.dx || call.dA ? scratch.get<float>(column_blocks * M * r) : nullptr;
  float* dB_parts = call.dB ? scratch.get<float>(used_row_blocks * N * r) : nullptr;
  for (int first = 0; first < r; first += kGroup) {
    const int rank = static_cast<int>(smaller(r - first, kGroup));
    with_width(rank, [&](auto width) {
      constexpr int kRank = decltype(width)::value;
      UpGradParams<T> params{};
      params.dy = call.dy;
      params.lora_B = {B.value.data + first, N, rank, B.value.stride};
      params.B_remainder = B.remainder ? B.remainder + first : nullptr;
      params.rank = rank, params.stride = r;
      params.h = call.dB ? h + first : nullptr;
      params.aligned = call.dy.aligned() && params.lora_B.aligned();
      params.rows_per_block = static_cast<int>(rows_per_block);
      params.columns_per_block = static_cast<int>(columns_per_block);
      params.dh = dh_parts ? dh_parts + first : nullptr;
      params.dB = dB_parts ? dB_parts + first : nullptr;
      const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(used_row_blocks));
      arch::launch(lora_up_grad_kernel<T, kRank>, grid, 128,
                   UpGradShape<kRank>::shared_bytes(params.columns_per_block), stream, params);
    });
  }
  if (call.dB) {
    const ReduceParams<TA> params{
        dB_parts, used_row_blocks, N * r, {call.scaling, call.scaling_factor}, call.dB};
    launch_elements(reduce_kernel<TA>, N * r, stream, params);
  }
  if (!dh_parts) return;
  float* dh = scratch.get<float>(M * r);
  const Scale dh_scale{call.scaling * survivor, call.scaling_factor};
  const Matrix<T> dh_operand = finish<T>(dh_parts, static_cast<int>(column_blocks), M, r, 1.0f,
                                         dh_scale, dh, scratch, stream);
  if (call.dA) {
    const int64_t k_blocks = ceil_div(K, DownGradShape<16>::kK);
    const int64_t wanted = larger(1, smaller(ceil_div(M, 64), kWantedBlocks / k_blocks));
    const int64_t rows = round_up(ceil_div(M, wanted), 64), blocks = ceil_div(M, rows);
    float* parts = scratch.get<float>(blocks * r * K);
    for (int first = 0; first < r; first += kGroup) {
      const int rank = static_cast<int>(smaller(r - first, kGroup));
      with_width(rank, [&](auto width) {
        constexpr int kRank = decltype(width)::value;
        DownGradParams<T> params{};
        params.x = call.x, params.dh = dh + first, params.rank = rank, params.stride = r;
        params.scale = dh_scale, params.aligned = call.x.aligned();
        params.dropout = call.dropout.enabled, params.threshold = call.dropout.threshold;
        params.rng_state = call.dropout.rng_state;
        params.rows_per_block = static_cast<int>(rows), params.dA = parts + first * K;
        const dim3 grid(static_cast<unsigned>(k_blocks), static_cast<unsigned>(blocks));
        arch::launch(lora_down_grad_kernel<T, kRank>, grid, 128, DownGradShape<kRank>::kSharedBytes,
                     stream, params);
      });
    }
    const ReduceParams<TA> params{parts, blocks, r * K, {1.0f, nullptr}, call.dA};
    launch_elements(reduce_kernel<TA>, r * K, stream, params);
  }
  if (call.dx) {
    GemmParams<T> params{};
    params.segments[params.count++] = {dh_operand, A.value};
    if (A.remainder) params.segments[params.count++] = {dh_operand, A.rest()};
    params.masked = call.dropout.enabled ? params.count : 0;
    params.threshold = call.dropout.threshold, params.rng_state = call.dropout.rng_state;
    params.segments[params.count++] = {call.dy, call.weight};
    params.out = call.dx, params.M = M, params.N = K;
    gemm<T, BLayout::kRows>(params, stream);
  }
}

}  // namespace lora_ext::sm80
