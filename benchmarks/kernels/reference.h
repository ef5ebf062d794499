// What the kernels have to give, by plain kernels that sum in double, on a sample of the result;
// and the random matrices to give it of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/lora_linear.h"
#include "memory.h"

namespace gpu_bench {

using gpu_test::check;
using namespace lora_ext;

// ---- Random matrices ---------------------------------------------------------------------------

template <class T>
struct NormalParams {
  T* out;
  int64_t count;
  uint64_t seed;
  float size;  // their standard deviation
};

// Of two uniform numbers each, by Box and Muller.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    normal_kernel(const __grid_constant__ NormalParams<T> params) {
  const int64_t i = element_index();
  if (i >= params.count) return;
  const PhiloxBlock bits = dropout_bits({params.seed, 0}, i, 0, 0);
  const float u = (static_cast<float>(bits.word[0] >> 8) + 0.5f) * 0x1p-24f;
  const float v = static_cast<float>(bits.word[1] >> 8) * 0x1p-24f;
  params.out[i] = rounded<T>(params.size * sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v));
}

template <class T>
void fill_normal(T* out, int64_t count, uint64_t seed, double size) {
  const NormalParams<T> params{out, count, seed, static_cast<float>(size)};
  launch_elements(normal_kernel<T>, count, nullptr, params);
}

// ---- Sums --------------------------------------------------------------------------------------

// Which rows of a matrix are looked at: all, or some of every tile, at every place of a tile.
struct Sample {
  int64_t rows, count, step;

  static Sample of(int64_t rows, int64_t most) {
    return rows <= most ? Sample{rows, rows, 1} : Sample{rows, most, rows / most + 1};
  }
};
LORA_EXT_HOST_DEVICE int64_t row_of(const Sample& sample, int64_t i) {
  return i * sample.step % sample.rows;
}

// An operand, its elements `row_step` and `column_step` apart.
template <class T>
struct View {
  const T* data;
  int64_t row_step, column_step;
};

template <class A, class B>
struct SumParams {
  View<A> a;  // [rows.rows, depth]
  View<B> b;  // [depth, columns]
  Sample rows;
  int64_t columns, depth;
  double scale;
  double* out;  // [rows.count, columns]: this is added to it
};

// One thread an element: threads next to each other share an element of b, and blocks rows of a.
template <class A, class B>
__global__ void __launch_bounds__(kElementThreads)
    sum_kernel(const __grid_constant__ SumParams<A, B> params) {
  const int64_t element = element_index();
  if (element >= params.rows.count * params.columns) return;
  const int64_t i = element % params.rows.count, j = element / params.rows.count;
  const A* const a = params.a.data + row_of(params.rows, i) * params.a.row_step;
  const B* const b = params.b.data + j * params.b.column_step;
  double sum = 0.0;
  for (int64_t k = 0; k < params.depth; ++k) {
    sum += double{to_float(a[k * params.a.column_step])} * to_float(b[k * params.b.row_step]);
  }
  params.out[i * params.columns + j] += params.scale * sum;
}

template <class A, class B>
void add_sums(const SumParams<A, B>& params) {
  launch_elements(sum_kernel<A, B>, params.rows.count * params.columns, nullptr, params);
}

// ---- Dropout -----------------------------------------------------------------------------------

struct DropParams {
  const Bf16* x;  // [rows, columns]
  Dropout dropout;
  int64_t rows, columns;
  Bf16* out;
};

__global__ void __launch_bounds__(kElementThreads)
    drop_kernel(const __grid_constant__ DropParams params) {
  const int64_t i = element_index();
  if (i >= params.rows * params.columns) return;
  const bool keep = dropout_keep(params.dropout.rng(), i / params.columns, i % params.columns,
                                 params.dropout.threshold);
  params.out[i] = keep ? params.x[i] : Bf16{0};
}

// dx of a sample: its low-rank part, where that is kept, and the base product.
struct MaskedSumParams {
  double* sums;        // [rows.count, columns]: the low-rank part, then the sum
  const double* base;  // [rows.count, columns]
  Dropout dropout;
  Sample rows;
  int64_t columns;
};

__global__ void __launch_bounds__(kElementThreads)
    masked_sum_kernel(const __grid_constant__ MaskedSumParams params) {
  const int64_t i = element_index();
  if (i >= params.rows.count * params.columns) return;
  const int64_t row = row_of(params.rows, i / params.columns), column = i % params.columns;
  const Dropout& dropout = params.dropout;
  const bool keep = !dropout.enabled || dropout_keep(dropout.rng(), row, column, dropout.threshold);
  params.sums[i] = (keep ? params.sums[i] : 0.0) + params.base[i];
}

struct ToFloatParams {
  const double* in;
  int64_t count;
  double scale;
  float* out;
};

__global__ void __launch_bounds__(kElementThreads)
    to_float_kernel(const __grid_constant__ ToFloatParams params) {
  const int64_t i = element_index();
  if (i < params.count) params.out[i] = static_cast<float>(params.scale * params.in[i]);
}

// ---- Errors ------------------------------------------------------------------------------------

// A matrix [rows, columns] that kernels made, or [columns, rows] if it is transposed; in parts, of
// which it is the sum.
template <class T>
struct Made {
  const T* data;
  int parts;
  int64_t rows, columns;
  bool transposed;

  int64_t elements() const { return parts * rows * columns; }
};

template <class T>
struct GatherParams {
  Made<T> made;
  Sample rows;
  double scale;
  double* out;      // [rows.count, columns]: the sample
  int* not_finite;  // how many of all elements are not finite
};

// One thread an element of all; the first of them gather the sample too.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    gather_kernel(const __grid_constant__ GatherParams<T> params) {
  const int64_t e = element_index();
  const Made<T>& made = params.made;
  const int64_t elements = made.rows * made.columns;
  if (e >= made.parts * elements) return;
  const float value = to_float(made.data[e]);
  if (!(value - value == 0.0f)) atomicAdd(params.not_finite, 1);
  if (e >= params.rows.count * made.columns) return;
  const int64_t row = row_of(params.rows, e / made.columns), column = e % made.columns;
  const int64_t at = made.transposed ? column * made.rows + row : row * made.columns + column;
  double sum = 0.0;
  for (int part = 0; part < made.parts; ++part) sum += to_float(made.data[part * elements + at]);
  params.out[e] = params.scale * sum;
}

template <class T>
std::vector<T> fetched(const T* data, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  check(cudaMemcpy(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

// What a sample of a result has to be.
struct Expected {
  Sample rows;
  int64_t columns;
  double* sums;  // [rows.count, columns], on the GPU

  int64_t count() const { return rows.count * columns; }
};

// Of one result: the root of the mean square of its error over that of what is expected, on the
// sample; and how many of all elements are not finite, as they are until they are written.
struct Error {
  std::string of;
  double error = 0.0, bound;
  int not_finite = 0;
  std::string worst;  // where, if it is beyond the bound

  bool right() const { return not_finite == 0 && error <= bound; }  // not so for NaN
};

template <class T>
Error error_of(const std::string& name, const Made<T>& made, double scale, const Expected& expected,
               double bound) {
  gpu_test::Memory memory;
  double* const gathered = memory.fresh<double>(static_cast<size_t>(expected.count()));
  int* const not_finite = memory.copy(std::vector<int>{0});
  const GatherParams<T> params{made, expected.rows, scale, gathered, not_finite};
  launch_elements(gather_kernel<T>, made.elements(), nullptr, params);
  check(cudaDeviceSynchronize());
  const std::vector<double> got = fetched(gathered, expected.count());
  const std::vector<double> want = fetched(expected.sums, expected.count());
  double error = 0.0, size = 0.0, most = -1.0;
  size_t worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double off = std::fabs(got[i] - want[i]);
    error += off * off, size += want[i] * want[i];
    if (off > most) most = off, worst = i;
  }
  Error result{name, std::sqrt(error / (size > 0 ? size : 1)), bound, fetched(not_finite, 1)[0],
               ""};
  if (result.right()) return result;
  const auto i = static_cast<int64_t>(worst);
  char text[120];
  std::snprintf(text, sizeof(text), "row %lld column %lld: got %.6g, expected %.6g",
                static_cast<long long>(row_of(expected.rows, i / expected.columns)),
                static_cast<long long>(i % expected.columns), got[worst], want[worst]);
  result.worst = text;
  return result;
}

}  // namespace gpu_bench
