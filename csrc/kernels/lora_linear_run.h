// Forward and backward of lora_linear, out of the passes of a family and the small kernels between
// them. Host code without torch; `T` is the 16-bit type of the base, `TA` that of the adapters, T
// or float.
#pragma once

#include "lora_linear_elementwise.h"

namespace lora_ext {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A copy of in [rows, columns], of elements `row_step` and `column_step` apart, as tensor cores
// read it.
template <class T, class TA>
Split<T> packed(const TA* in, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step,
                const Allocator& scratch, Stream stream) {
  const int64_t padded = round_up(columns, 8);
  PackParams<T, TA> pack{.in = in,
                         .rows = rows,
                         .columns = columns,
                         .row_step = row_step,
                         .column_step = column_step,
                         .padded = padded,
                         .value = scratch.get<T>(rows * padded),
                         .remainder = nullptr};
  if constexpr (!kSame<T, TA>) pack.remainder = scratch.get<T>(rows * padded);
  launch_elements(lora_linear_pack_kernel<T, TA>, rows * padded, stream, pack);
  return {{pack.value, rows, columns, padded}, pack.remainder};
}

// Of in [rows, columns], contiguous: as it is where tensor cores can read that, else a packed copy.
template <class T, class TA>
Split<T> split(const TA* in, int64_t rows, int64_t columns, const Allocator& scratch,
               Stream stream) {
  if constexpr (kSame<T, TA>) {
    const Matrix<T> as_it_is{in, rows, columns, columns};
    if (as_it_is.aligned()) return {as_it_is, nullptr};
  }
  return packed<T>(in, rows, columns, columns, 1, scratch, stream);
}

// Of its transpose [columns, rows], a packed copy: the adapter beside a weight that lies
// transposed.
template <class T, class TA>
Split<T> split_transposed(const TA* in, int64_t rows, int64_t columns, const Allocator& scratch,
                          Stream stream) {
  return packed<T>(in, columns, rows, 1, columns, scratch, stream);
}

// The parts of h or dh [M, r], added: times `survivor` into `sums` in float if that is not null;
// and times `scaling` as well as an operand of the passes.
template <class T>
Split<T> finish(const Parts& parts, int64_t M, int64_t r, float survivor, HiddenFactor scaling,
                float* sums, bool wants_remainder, const Allocator& scratch, Stream stream) {
  const int64_t padded = round_up(r, 16);
  const FinishParams<T> params{.parts = parts.data,
                               .count = parts.count,
                               .M = M,
                               .r = static_cast<int>(r),
                               .padded = static_cast<int>(padded),
                               .survivor = survivor,
                               .scaling = scaling,
                               .sums = sums,
                               .value = scratch.get<T>(M * padded),
                               .remainder = wants_remainder ? scratch.get<T>(M * padded) : nullptr};
  launch_elements(lora_linear_finish_kernel<T>, M * padded, stream, params);
  return {{params.value, M, padded, padded}, params.remainder};
}

// out [elements] = scale * the sum of the parts
template <class TA>
void reduce(const Parts& parts, int64_t elements, HiddenFactor scale, TA* out, Stream stream) {
  launch_elements(lora_linear_reduce_kernel<TA>, elements, stream,
                  ReduceParams<TA>{parts.data, parts.count, elements, scale, out});
}

template <class T>
void add_segments(Product<T>& product, const Matrix<T>& a, const Split<T>& b) {
  product.segments[product.count++] = {a, b.value};
  if (b.remainder) product.segments[product.count++] = {a, b.rest()};
}

template <class T>
void launch_product(const Family<T>& family, Product<T>& product, BLayout layout, Stream stream) {
  product.aligned = true;
  for (int s = 0; s < product.count; ++s) {
    product.aligned &= product.segments[s].a.aligned() && product.segments[s].b.aligned();
  }
  family.product(product, layout, stream);
}

inline float survivor(const Dropout& dropout) { return dropout.enabled ? dropout.scale : 1.0f; }

template <class T, class TA>
void forward(const Family<T>& family, const ForwardCall<T, TA>& call, const Allocator& scratch,
             Stream stream) {
  const int64_t M = call.x.rows, K = call.x.columns, N = call.weight.N();
  const bool by_columns = call.weight.transposed;
  const Split<T> A = split<T>(call.lora_A, call.r, K, scratch, stream);
  const Split<T> B = by_columns ? split_transposed<T>(call.lora_B, N, call.r, scratch, stream)
                                : split<T>(call.lora_B, N, call.r, scratch, stream);
  const Parts parts = family.down(call.x, A, call.dropout, scratch, stream);
  const Split<T> h = finish<T>(parts, M, call.r, survivor(call.dropout),
                               {call.scaling, call.scaling_factor}, call.h, false, scratch, stream);
  Product<T> y{};
  if (call.weight.stored.data) y.segments[y.count++] = {call.x, call.weight.stored};
  add_segments(y, h.value, B);
  y.bias = call.bias;
  y.out = call.y, y.M = M, y.N = N;
  launch_product(family, y, by_columns ? BLayout::kRows : BLayout::kColumns, stream);
}

template <class T, class TA>
void backward(const Family<T>& family, const BackwardCall<T, TA>& call, const Allocator& scratch,
              Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, K = call.weight.K(), r = call.r;
  const HiddenFactor scaling{call.scaling, call.scaling_factor};
  const bool by_columns = call.weight.transposed, makes_h = call.dB && !call.h;
  Split<T> A{}, h{};
  if (makes_h || (call.dx && !by_columns)) A = split<T>(call.lora_A, r, K, scratch, stream);
  const Split<T> B = split<T>(call.lora_B, N, r, scratch, stream);
  if (call.dB && call.h) {
    h = split<T>(call.h, M, r, scratch, stream);
  } else if (makes_h) {
    const Parts parts = family.down(call.x, A, call.dropout, scratch, stream);
    h = finish<T>(parts, M, r, survivor(call.dropout), {1.0f, nullptr}, nullptr, true, scratch,
                  stream);
  }
  const UpGradParts up = family.up_grad({call.dy, B, h, call.dx || call.dA}, scratch, stream);
  if (call.dB) reduce(up.dB, N * r, scaling, call.dB, stream);
  if (!up.dh.data) return;

  const Split<T> dh =
      finish<T>(up.dh, M, r, survivor(call.dropout), scaling, nullptr, call.dA, scratch, stream);
  if (call.dA) {
    const Parts parts = family.down_grad(call.x, dh.columns(0, r), call.dropout, scratch, stream);
    reduce(parts, r * K, {1.0f, nullptr}, call.dA, stream);
  }
  if (call.dx) {
    Product<T> dx{};
    add_segments(dx, dh.value,
                 by_columns ? split_transposed<T>(call.lora_A, r, K, scratch, stream) : A);
    dx.masked = call.dropout.enabled ? dx.count : 0;
    dx.dropout = call.dropout;
    if (call.weight.stored.data) dx.segments[dx.count++] = {call.dy, call.weight.stored};
    dx.out = call.dx, dx.M = M, dx.N = K;
    launch_product(family, dx, by_columns ? BLayout::kColumns : BLayout::kRows, stream);
  }
}

// choose_cuda_path asks for sm_90a's only where they are built.
template <class T>
const Family<T>& passes_of(KernelFamily family) {
#if defined(LORA_EXT_SM90)
  if (family == KernelFamily::Sm90) return sm90::kFamily<T>;
#endif
  static_cast<void>(family);
  return sm80::kFamily<T>;
}

template <class T, class TA>
void run_forward(const ForwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                 KernelFamily family) {
  forward(passes_of<T>(family), call, scratch, stream);
}

template <class T, class TA>
void run_backward(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                  KernelFamily family) {
  backward(passes_of<T>(family), call, scratch, stream);
}

}  // namespace lora_ext
