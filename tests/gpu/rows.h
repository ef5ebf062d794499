// The kernels of DoRA and embeddings on random matrices, against sums in double on the host.
#pragma once

#include "kernels/column_scale.h"
#include "kernels/lora_embedding.h"
#include "kernels/weight_norm.h"
#include "problem.h"

namespace gpu_test {

// Half a unit of bf16, and sums in float.
constexpr double kRowBound = 1.0 / 512 + 0x1p-20;

// Of rows `stride` elements apart, and an update of rank r.
template <class T, class TA>
void run_norms_and_lookups(int rows, int columns, int stride, int r) {
  const auto count = [](int a, int b) { return size_t(a) * size_t(b); };
  const auto table = random_values<T>(count(rows, stride), 1);
  const auto A = random_values<TA>(count(r, columns), 2), B = random_values<TA>(count(rows, r), 3);
  const Doubles a = widened(A), b = widened(B), w = widened(table);
  Memory memory;
  const lora_ext::Matrix<T> weight{memory.copy(table), rows, columns, stride};
  const TA *A_on_gpu = memory.copy(A), *B_on_gpu = memory.copy(B);

  Doubles sum(count(rows, columns));
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = w[i / columns * stride + i % columns];
  const Doubles looked_up = sum;
  add_product(
      sum, rows, columns, r, 0.5, [&](int i, int k) { return b[count(i, r) + k]; },
      [&](int k, int j) { return a[count(k, columns) + j]; });
  for (const bool by_column : {false, true}) {
    Doubles want(size_t(by_column ? columns : rows));
    for (size_t i = 0; i < sum.size(); ++i) {
      want[by_column ? i % columns : i / columns] += sum[i] * sum[i];
    }
    for (double& value : want) value = std::sqrt(value);
    float* const norms = memory.fresh<float>(want.size());
    lora_ext::run_weight_norm(
        lora_ext::WeightNormCall<T, TA>{weight, A_on_gpu, B_on_gpu, r, 0.5f, by_column, norms},
        memory.allocator(), nullptr);
    expect_close("norms", fetched(norms, want.size()), want, 0x1p-20);
  }

  // The same table, of `rows` tokens; each is looked up, in another order
  std::vector<int64_t> tokens;
  for (int m = 0; m < rows; ++m) tokens.push_back((m * 7 + 3) % rows);
  const auto of_tokens = random_values<TA>(count(r, rows), 4);
  const auto of_columns = random_values<TA>(count(columns, r), 5);
  const Doubles h = widened(of_tokens), up = widened(of_columns);
  Doubles want(looked_up.size());
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = looked_up[count(int(tokens[i / columns]), columns) + i % columns];
  }
  add_product(
      want, rows, columns, r, 0.5,
      [&](int i, int k) { return h[count(k, rows) + size_t(tokens[size_t(i)])]; },
      [&](int k, int j) { return up[count(j, r) + k]; });
  T* const y = memory.fresh<T>(want.size());
  lora_ext::run_lora_embedding(
      lora_ext::EmbeddingCall<T, TA>{memory.copy(tokens), rows, weight, memory.copy(of_tokens),
                                     memory.copy(of_columns), r, 0.5f, y},
      nullptr);
  expect_close("lookup", fetched(y, want.size()), want, kRowBound);
}

template <class T>
void run_column_scales(int rows, int columns) {
  const size_t count = size_t(rows) * size_t(columns);
  const auto z = random_values<T>(count, 1), dy = random_values<T>(count, 2);
  const auto scale = random_values<float>(size_t(columns), 3);
  const auto bias = random_values<float>(size_t(columns), 4);
  const Doubles Z = widened(z), DY = widened(dy);
  Doubles want_y(count), want_dz(count), want_dscale(scale.size()), want_dbias(scale.size());
  for (size_t i = 0; i < count; ++i) {
    const size_t n = i % size_t(columns);
    want_y[i] = Z[i] * scale[n] + bias[n], want_dz[i] = DY[i] * scale[n];
    want_dscale[n] += DY[i] * Z[i], want_dbias[n] += DY[i];
  }
  Memory memory;
  const lora_ext::Matrix<T> z_on_gpu{memory.copy(z), rows, columns, columns};
  const lora_ext::Matrix<T> dy_on_gpu{memory.copy(dy), rows, columns, columns};
  const float* const scale_on_gpu = memory.copy(scale);
  T *y = memory.fresh<T>(count), *dz = memory.fresh<T>(count);
  float* const dscale = memory.fresh<float>(scale.size());
  float* const dbias = memory.fresh<float>(scale.size());
  lora_ext::run_column_scale(
      lora_ext::ColumnScaleCall<T>{z_on_gpu, scale_on_gpu, memory.copy(bias), y}, nullptr);
  lora_ext::run_column_scale_backward(
      lora_ext::ColumnScaleBackwardCall<T>{dy_on_gpu, z_on_gpu, scale_on_gpu, dz, dscale, dbias},
      memory.allocator(), nullptr);
  expect_close("y", fetched(y, count), want_y, kRowBound);
  expect_close("dz", fetched(dz, count), want_dz, kRowBound);
  expect_close("dscale", fetched(dscale, scale.size()), want_dscale, 0x1p-20);
  expect_close("dbias", fetched(dbias, scale.size()), want_dbias, 0x1p-20);
}

// Rows of whole 16 bytes, and others; several tiles and ranks, and the last ones not full.
template <class T, class TA>
void run_rows() {
  run_norms_and_lookups<T, TA>(70, 264, 264, 40);
  run_norms_and_lookups<T, TA>(33, 257, 263, 8);
  run_column_scales<T>(200, 264);
  run_column_scales<T>(70, 257);
}

}  // namespace gpu_test
