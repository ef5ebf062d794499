// Forward and backward of lora_linear, out of the passes of a family and the small kernels between
// them. Host code without torch; `T` is the 16-bit type of the base, `TA` that of the adapters, T
// or float.
#pragma once

#include "launch_few_rows_sm80.h"
#include "lora_linear_elementwise.h"

namespace lora_ext {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Where the remainder of a float adapter lies. The product takes a small rank's value and remainder
// as one matrix, joined along the rank, and h or dh twice beside itself to meet both: one slot of
// the ring instead of two.
enum class Remainder { kApart, kInColumns, kInRows };

constexpr int kMostJoined = 32;  // ranks: two of them are 64, as a slot has

template <class T, class TA>
Remainder joined(int64_t r, BLayout layout) {
  if (kSame<T, TA> || r > kMostJoined) return Remainder::kApart;
  return layout == BLayout::kColumns ? Remainder::kInColumns : Remainder::kInRows;
}

constexpr int64_t joined_rank(int64_t r) { return round_up(r, 16); }  // of each of the two
constexpr int copies(Remainder place) { return place == Remainder::kApart ? 1 : 2; }  // of h or dh

// What makes a copy of in [rows, columns], of elements `row_step` and `column_step` apart, as
// tensor cores read it.
template <class T, class TA>
PackParams<T, TA> packing(const TA* in, int64_t rows, int64_t columns, int64_t row_step,
                          int64_t column_step, Remainder place, const Allocator& scratch) {
  const bool in_columns = place == Remainder::kInColumns, in_rows = place == Remainder::kInRows;
  PackParams<T, TA> pack{.in = in,
                         .rows = rows,
                         .columns = columns,
                         .row_step = row_step,
                         .column_step = column_step,
                         .padded_rows = in_rows ? joined_rank(rows) : rows,
                         .padded_columns = in_columns ? joined_rank(columns) : round_up(columns, 8),
                         .stride = 0,
                         .value = nullptr,
                         .remainder = nullptr};
  pack.stride = (in_columns ? 2 : 1) * pack.padded_columns;
  const int64_t elements = pack.padded_rows * pack.stride;
  pack.value = scratch.get<T>((in_rows ? 2 : 1) * elements);
  if constexpr (!kSame<T, TA>) {
    pack.remainder = in_columns ? pack.value + pack.padded_columns
                     : in_rows  ? pack.value + elements
                                : scratch.get<T>(elements);
  }
  return pack;
}

template <class T, class TA>
Split<T> packed(const TA* in, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step,
                Remainder place, const Allocator& scratch, Stream stream) {
  const auto pack = packing<T>(in, rows, columns, row_step, column_step, place, scratch);
  launch_elements(lora_linear_pack_kernel<T, TA>, pack.elements(), stream, pack);
  return pack.result();
}

// in [rows, columns], contiguous, as it is where tensor cores can read that; else without data.
template <class T, class TA>
Split<T> as_it_is(const TA* in, int64_t rows, int64_t columns) {
  if constexpr (kSame<T, TA>) {
    const Matrix<T> matrix{in, rows, columns, columns};
    if (matrix.aligned()) return {matrix, nullptr};
  }
  return {};
}

// Of the same: as it is, or a packed copy.
template <class T, class TA>
Split<T> split(const TA* in, int64_t rows, int64_t columns, Remainder place,
               const Allocator& scratch, Stream stream) {
  const Split<T> found = as_it_is<T>(in, rows, columns);
  if (found.value.data) return found;
  return packed<T>(in, rows, columns, columns, 1, place, scratch, stream);
}

// Of its transpose [columns, rows], a packed copy: the adapter beside a weight that lies
// transposed.
template <class T, class TA>
Split<T> split_transposed(const TA* in, int64_t rows, int64_t columns, Remainder place,
                          const Allocator& scratch, Stream stream) {
  return packed<T>(in, columns, rows, 1, columns, place, scratch, stream);
}

// What adds the parts of h or dh [M, r], whose rows are so far apart, for `copies` beside each
// other; where to is not said yet.
template <class T>
FinishParams<T> finishing(const Parts& parts, int64_t parts_stride, int64_t M, int64_t r,
                          int copies, HiddenFactor scaling) {
  const int64_t padded = joined_rank(r);
  return {.parts = parts.data,
          .count = parts.count,
          .M = M,
          .parts_stride = parts_stride,
          .r = static_cast<int>(r),
          .padded = static_cast<int>(padded),
          .copies = copies,
          .stride = copies * padded,
          .survivor = 1.0f,
          .scaling = scaling,
          .sums = nullptr,
          .value = nullptr,
          .remainder = nullptr};
}

// The parts of h or dh [M, r], added: times `survivor` into `sums` in float if that is not null;
// and times `scaling` as well as an operand of the passes, `copies` beside each other.
template <class T>
Split<T> finish(const Parts& parts, int64_t M, int64_t r, int copies, float survivor,
                HiddenFactor scaling, float* sums, bool wants_remainder, const Allocator& scratch,
                Stream stream) {
  FinishParams<T> params = finishing<T>(parts, r, M, r, copies, scaling);
  params.survivor = survivor, params.sums = sums;
  params.value = scratch.get<T>(M * params.stride);
  if (wants_remainder) params.remainder = scratch.get<T>(M * params.stride);
  launch_elements(lora_linear_finish_kernel<T>, M * params.padded, stream, params);
  return {{params.value, M, params.padded, params.stride}, params.remainder};
}

// What makes out [elements] = scale * the sum of the parts, which are `step` apart.
template <class TA>
ReduceParams<TA> reducing(const Parts& parts, int64_t step, int64_t elements, HiddenFactor scale,
                          TA* out) {
  return {parts.data, parts.count, step, elements, scale, out};
}
template <class TA>
void reduce(const Parts& parts, int64_t elements, HiddenFactor scale, TA* out, Stream stream) {
  launch_elements(lora_linear_reduce_kernel<TA>, elements, stream,
                  reducing(parts, elements, elements, scale, out));
}

// h or dh [M, r], of which there are two copies unless the remainder of b lies apart.
template <class T>
void add_segments(Product<T>& product, const Matrix<T>& h, const Split<T>& b, Remainder place) {
  Segment<T>& first = product.segments[product.count++];
  first = {h, b.value};
  if (place == Remainder::kApart) {
    if (b.remainder) product.segments[product.count++] = {h, b.rest()};
    return;
  }
  first.a.columns *= 2;
  (place == Remainder::kInColumns ? first.b.columns : first.b.rows) = first.a.columns;
}

template <class T>
bool aligned(const Product<T>& product) {
  bool aligned = true;
  for (int s = 0; s < product.count; ++s) {
    aligned &= product.segments[s].a.aligned() && product.segments[s].b.aligned();
  }
  return aligned;
}

template <class T>
void launch_product(const Family<T>& family, Product<T>& product, BLayout layout, Stream stream) {
  product.aligned = aligned(product);
  family.products({&product, 1}, layout, stream);
}

inline float survivor(const Dropout& dropout) { return dropout.enabled ? dropout.scale : 1.0f; }

template <class T, class TA>
void forward(const Family<T>& family, const ForwardCall<T, TA>& call, const Allocator& scratch,
             Stream stream) {
  const int64_t M = call.x.rows, K = call.x.columns, N = call.weight.N();
  const BLayout layout = call.weight.transposed ? BLayout::kRows : BLayout::kColumns;
  const Remainder place = joined<T, TA>(call.r, layout);
  const Split<T> A = split<T>(call.lora_A, call.r, K, Remainder::kApart, scratch, stream);
  const Split<T> B = layout == BLayout::kRows
                         ? split_transposed<T>(call.lora_B, N, call.r, place, scratch, stream)
                         : split<T>(call.lora_B, N, call.r, place, scratch, stream);
  const Parts parts = family.down(call.x, A, call.dropout, scratch, stream);
  const Split<T> h = finish<T>(parts, M, call.r, copies(place), survivor(call.dropout),
                               {call.scaling, call.scaling_factor}, call.h, false, scratch, stream);
  Product<T> y{};
  if (call.weight.stored.data) y.segments[y.count++] = {call.x, call.weight.stored};
  add_segments(y, h.value, B, place);
  y.bias = call.bias;
  y.out = call.y, y.M = M, y.N = N;
  launch_product(family, y, layout, stream);
}

template <class T, class TA>
void backward(const Family<T>& family, const BackwardCall<T, TA>& call, const Allocator& scratch,
              Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, K = call.weight.K(), r = call.r;
  const HiddenFactor scaling{call.scaling, call.scaling_factor};
  const BLayout layout = call.weight.transposed ? BLayout::kColumns : BLayout::kRows;
  const bool by_columns = call.weight.transposed, makes_h = call.dB && !call.h;
  const Remainder place = call.dx ? joined<T, TA>(r, layout) : Remainder::kApart;
  Split<T> A{}, h{};
  if (makes_h || (call.dx && !by_columns)) {
    A = split<T>(call.lora_A, r, K, by_columns ? Remainder::kApart : place, scratch, stream);
  }
  const Split<T> B = split<T>(call.lora_B, N, r, Remainder::kApart, scratch, stream);
  if (call.dB && call.h) {
    h = split<T>(call.h, M, r, Remainder::kApart, scratch, stream);
  } else if (makes_h) {
    const Parts parts = family.down(call.x, A, call.dropout, scratch, stream);
    h = finish<T>(parts, M, r, 1, survivor(call.dropout), {1.0f, nullptr}, nullptr, true, scratch,
                  stream);
  }
  const UpGradParts up = family.up_grad({call.dy, B, h, call.dx || call.dA}, scratch, stream);
  if (call.dB) reduce(up.dB, N * r, scaling, call.dB, stream);
  if (!up.dh.data) return;

  const Split<T> dh = finish<T>(up.dh, M, r, copies(place), survivor(call.dropout), scaling,
                                nullptr, call.dA, scratch, stream);
  KeptBits kept{};
  if (call.dA) {
    if (call.dx && call.dropout.drops()) kept = KeptBits::allocate(M, K, scratch);
    const Parts parts =
        family.down_grad(call.x, dh.columns(0, r), call.dropout, kept, scratch, stream);
    reduce(parts, r * K, {1.0f, nullptr}, call.dA, stream);
  }
  if (call.dx) {
    Product<T> dx{};
    if (by_columns) A = split_transposed<T>(call.lora_A, r, K, place, scratch, stream);
    add_segments(dx, dh.value, A, place);
    dx.masked = call.dropout.drops() ? dx.count : 0;
    dx.dropout = call.dropout, dx.kept = kept;
    if (call.weight.stored.data) dx.segments[dx.count++] = {call.dy, call.weight.stored};
    dx.out = call.dx, dx.M = M, dx.N = K;
    launch_product(family, dx, layout, stream);
  }
}

template <class T, class TA>
void up_grad(const Family<T>& family, const UpGradCall<T, TA>& call, const Allocator& scratch,
             Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, r = call.r;
  const HiddenFactor scaling{call.scaling, nullptr};
  const Split<T> B = split<T>(call.lora_B, N, r, Remainder::kApart, scratch, stream);
  Split<T> h{};
  if (call.dB) h = split<T>(call.h, M, r, Remainder::kApart, scratch, stream);
  const UpGradParts up = family.up_grad({call.dy, B, h, call.dh != nullptr}, scratch, stream);
  if (call.dB) reduce(up.dB, N * r, scaling, call.dB, stream);
  if (call.dh) reduce(up.dh, M * r, scaling, call.dh, stream);
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
  if (sm80::takes_few_rows(call, family)) return sm80::launch_few_rows(call, stream, family);
  forward(passes_of<T>(family), call, scratch, stream);
}

template <class T, class TA>
void run_backward(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                  KernelFamily family) {
  backward(passes_of<T>(family), call, scratch, stream);
}

template <class T, class TA>
void run_up_grad(const UpGradCall<T, TA>& call, const Allocator& scratch, Stream stream,
                 KernelFamily family) {
  up_grad(passes_of<T>(family), call, scratch, stream);
}

}  // namespace lora_ext
