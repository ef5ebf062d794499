// column_scale and its gradients on a range of rows: one pass over each operand.
#pragma once

#include "../column_scale_kernels.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

// Rows [begin, end) of y (+)= z * scale + bias
template <class T>
void column_scale_rows(const ColumnScaleArgs& args, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const auto* scale = static_cast<const S*>(args.scale);
  const auto* bias = static_cast<const S*>(args.bias);
  for (int64_t m = begin; m < end; ++m) {
    const T* z = static_cast<const T*>(args.z) + m * args.ldz;
    T* y = static_cast<T*>(args.y) + m * args.N;
    for (int64_t j = 0; j < args.N; j += V::kWidth) {
      const int lanes = static_cast<int>(at_most(args.N - j, V::kWidth));
      auto offset = bias ? load_lanes<S>(bias + j, lanes) : V::zero();
      if (args.adds) offset = V::add(load_lanes<S>(y + j, lanes), offset);
      store_lanes<S>(y + j,
                     V::fma(load_lanes<S>(z + j, lanes), load_lanes<S>(scale + j, lanes), offset),
                     lanes);
    }
  }
}

// Columns [j, j + lanes) of kRows rows: dz = dy * scale, and the sums over the rows.
template <class T, int kRows>
inline void column_scale_tile(const ColumnScaleBackwardArgs& args, int64_t m, int64_t j, int lanes,
                              compute_t<T>* dscale, compute_t<T>* dbias) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const auto* dy = static_cast<const T*>(args.dy) + m * args.lddy + j;
  const auto* z = static_cast<const T*>(args.z) + m * args.ldz + j;
  auto* dz = static_cast<T*>(args.dz) + m * args.N + j;
  const auto scale = load_lanes<S>(static_cast<const S*>(args.scale) + j, lanes);
  auto scale_sum = V::zero(), bias_sum = V::zero();
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const auto gradient = load_lanes<S>(dy + i * args.lddy, lanes);
    if (dscale) scale_sum = V::fma(gradient, load_lanes<S>(z + i * args.ldz, lanes), scale_sum);
    if (dbias) bias_sum = V::add(bias_sum, gradient);
    if (args.dz) store_lanes<S>(dz + i * args.N, V::mul(gradient, scale), lanes);
  }
  const auto add = [&](S* sum, typename V::Reg of_tile) {
    store_lanes<S>(sum + j, V::add(load_lanes<S>(sum + j, lanes), of_tile), lanes);
  };
  if (dscale) add(dscale, scale_sum);
  if (dbias) add(dbias, bias_sum);
}

template <class T, int kRows>
inline void column_scale_row_tile(const ColumnScaleBackwardArgs& args, int64_t m,
                                  compute_t<T>* dscale, compute_t<T>* dbias) {
  constexpr int kWidth = Vec<compute_t<T>>::kWidth;
  int64_t j = 0;
  for (; j + kWidth <= args.N; j += kWidth) {
    column_scale_tile<T, kRows>(args, m, j, kWidth, dscale, dbias);
  }
  if (j < args.N) {
    column_scale_tile<T, kRows>(args, m, j, static_cast<int>(args.N - j), dscale, dbias);
  }
}

// sum [N] += few [N], few = 0
template <class S>
void drain(S* few, S* sum, int64_t N) {
  for (int64_t j = 0; sum && j < N; ++j) {
    sum[j] += few[j];
    few[j] = 0;
  }
}

// Rows [begin, end) of dz; their sums are added to dscale and dbias [N].
template <class T>
void column_scale_backward_rows(const ColumnScaleBackwardArgs& args, int64_t begin, int64_t end,
                                void* dscale_sum, void* dbias_sum, void* scratch) {
  using S = compute_t<T>;
  // Sums of tiles of 8 rows are added up to sums of so many, and those to the result: few enough in
  // sequence each time to err no more than ATen's sums.
  constexpr int64_t kSumRows = 128;
  auto* dscale = static_cast<S*>(dscale_sum);
  auto* dbias = static_cast<S*>(dbias_sum);
  auto* sums = static_cast<S*>(scratch);
  for (int64_t j = 0; j < 2 * args.N; ++j) sums[j] = 0;
  S* dscale_of_few = dscale ? sums : nullptr;
  S* dbias_of_few = dbias ? sums + args.N : nullptr;
  for (int64_t first = begin; first < end; first += kSumRows) {
    const int64_t last = first + at_most(end - first, kSumRows);
    int64_t m = first;
    for (; m + 8 <= last; m += 8) column_scale_row_tile<T, 8>(args, m, dscale_of_few, dbias_of_few);
    for (; m < last; ++m) column_scale_row_tile<T, 1>(args, m, dscale_of_few, dbias_of_few);
    drain(dscale_of_few, dscale, args.N);
    drain(dbias_of_few, dbias, args.N);
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
