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

// Copies of adapters and of h as tensor cores read them, all made by one kernel, before the passes.
template <class T>
class Packs {
 public:
  explicit Packs(const Allocator& scratch) : scratch_(scratch) {}

  // Of in [rows, columns], contiguous: as it is where tensor cores can read that, else a copy.
  template <class TA>
  Split<T> split(const TA* in, int64_t rows, int64_t columns, Remainder place) {
    if constexpr (kSame<T, TA>) {
      const Matrix<T> as_it_is{in, rows, columns, columns};
      if (as_it_is.aligned()) return {as_it_is, nullptr};
    }
    return packed(in, rows, columns, columns, 1, place);
  }

  // Of its transpose [columns, rows], a copy: the adapter beside a weight that lies transposed.
  template <class TA>
  Split<T> split_transposed(const TA* in, int64_t rows, int64_t columns, Remainder place) {
    return packed(in, columns, rows, 1, columns, place);
  }

  // Of a range whole warps.
  void add(const PackJob<T>& job) {
    const int64_t elements = job.padded_rows * job.padded_columns;
    jobs_.add(job, job.range.largest ? round_up(elements, 32) : elements);
  }

  // Of fp16: that of so many float matrices of one launch, which are packed by one power of two.
  Range range_of(int matrices) const {
    if constexpr (!kScaled<T>) return {};
    const int parts = matrices * Range::kBlocks;
    return {scratch_.get<uint32_t>(parts), parts, scratch_.get<float>(1)};
  }
  // This one of them, contiguous, before anything is packed.
  void measure(const PackJob<T>& job, int which) {
    measures_.add({.in = static_cast<const float*>(job.in),
                   .count = job.rows * job.columns,
                   .factor = job.factor,
                   .largest = job.range.largest + which * Range::kBlocks},
                  Range::kBlocks * kElementThreads);
  }

  void launch(Stream stream) {
    if constexpr (kScaled<T>) {
      measures_.launch(lora_linear_measure_kernel<T>, stream, MeasureJob::kSharedBytes);
    }
    jobs_.launch(lora_linear_pack_kernel<T>, stream);
  }

 private:
  // Of in [rows, columns], of elements `row_step` and `column_step` apart.
  template <class TA>
  Split<T> packed(const TA* in, int64_t rows, int64_t columns, int64_t row_step,
                  int64_t column_step, Remainder place) {
    const bool in_columns = place == Remainder::kInColumns, in_rows = place == Remainder::kInRows;
    PackJob<T> job{.in = in,
                   .in_float = !kSame<T, TA>,
                   .rows = rows,
                   .columns = columns,
                   .row_step = row_step,
                   .column_step = column_step,
                   .padded_rows = in_rows ? joined_rank(rows) : rows,
                   .padded_columns = in_columns ? joined_rank(columns) : round_up(columns, 8),
                   .stride = 0,
                   .value = nullptr,
                   .remainder = nullptr};
    job.stride = (in_columns ? 2 : 1) * job.padded_columns;
    const int64_t elements = job.padded_rows * job.stride;
    job.value = scratch_.get<T>((in_rows ? 2 : 1) * elements);
    if constexpr (!kSame<T, TA>) {
      job.remainder = in_columns ? job.value + job.padded_columns
                      : in_rows  ? job.value + elements
                                 : scratch_.get<T>(elements);
    }
    if constexpr (kScaled<T> && !kSame<T, TA>) {
      job.range = range_of(1);
      measure(job, 0);
    }
    add(job);
    return {{job.value, rows, columns, job.stride}, job.remainder, job.range.back};
  }

  const Allocator& scratch_;
  JobList<PackJob<T>> jobs_;
  JobList<MeasureJob> measures_;
};

// Where h or dh [M, r] goes in float: each sum times `survivor`.
template <class T>
Hidden<T> float_hidden(int64_t M, int64_t r, float survivor, float* sums) {
  return {.M = M,
          .r = static_cast<int>(r),
          .padded = static_cast<int>(joined_rank(r)),
          .copies = 1,
          .stride = 0,
          .survivor = survivor,
          .scaling = {1.0f, nullptr},
          .sums = sums,
          .value = nullptr,
          .remainder = nullptr};
}
// There, unless `sums` is null; and times `scaling` as well into an operand of the passes, `copies`
// beside each other. `back`: that of the matrix that makes the sums.
template <class T>
Hidden<T> hidden(int64_t M, int64_t r, int copies, float survivor, const float* back,
                 HiddenFactor scaling, float* sums, bool wants_remainder,
                 const Allocator& scratch) {
  Hidden<T> hidden = float_hidden<T>(M, r, survivor, sums);
  hidden.copies = copies, hidden.stride = int64_t{copies} * hidden.padded;
  hidden.scaling = scaling, hidden.back = back;
  hidden.value = scratch.get<T>(M * hidden.stride);
  if (wants_remainder) hidden.remainder = scratch.get<T>(M * hidden.stride);
  if (kScaled<T> && !sums) hidden.sums = scratch.get<float>(M * r);
  return hidden;
}

// What a pass is to make of it: both, or of fp16 the sums alone, of which `add_operand` makes the
// operand when they are known.
template <class T>
Hidden<T> made_by_pass(Hidden<T> hidden) {
  if constexpr (kScaled<T>) hidden.value = nullptr;
  return hidden;
}
// It is this one of the matrices of the range.
template <class T>
void add_operand(Packs<T>& packs, const Hidden<T>& hidden, const Range& range, int which = 0) {
  if constexpr (!kScaled<T>) return;
  for (int64_t copy = 0; copy < hidden.copies; ++copy) {
    const int64_t at = copy * hidden.padded;
    const PackJob<T> job{.in = hidden.sums,
                         .in_float = true,
                         .rows = hidden.M,
                         .columns = hidden.r,
                         .row_step = hidden.r,
                         .column_step = 1,
                         .padded_rows = hidden.M,
                         .padded_columns = hidden.padded,
                         .stride = hidden.stride,
                         .value = hidden.value + at,
                         .remainder = hidden.remainder ? hidden.remainder + at : nullptr,
                         .range = range,
                         .factor = hidden.scaling};
    if (copy == 0) packs.measure(job, which);
    packs.add(job);
  }
}
template <class T>
Split<T> operand(const Hidden<T>& hidden, const Range& range) {
  const Matrix<T> value{hidden.value, hidden.M, hidden.padded, hidden.stride};
  return {value, hidden.remainder, range.back};
}
// Of one, after the pass.
template <class T>
Split<T> operand(const Hidden<T>& hidden, const Allocator& scratch, Stream stream) {
  Packs<T> packs(scratch);
  const Range range = packs.range_of(1);
  add_operand(packs, hidden, range);
  packs.launch(stream);
  return operand(hidden, range);
}

template <class T, class TA>
Gradient<T> gradient(TA* out, HiddenFactor scale, const float* back) {
  if constexpr (kSame<T, TA>) return {scale, out, nullptr, back};
  if constexpr (!kSame<T, TA>) return {scale, nullptr, out, back};
}

// h or dh [M, r], of which there are two copies unless the remainder of b lies apart.
template <class T>
void add_segments(Product<T>& product, const Split<T>& h, const Split<T>& b, Remainder place) {
  Segment<T>& first = product.segments[product.count++];
  first = {h.value, b.value};
  if (place != Remainder::kApart) {
    first.a.columns *= 2;
    (place == Remainder::kInColumns ? first.b.columns : first.b.rows) = first.a.columns;
  } else if (b.remainder) {
    product.segments[product.count++] = {h.value, b.rest()};
  }
  if constexpr (kScaled<T>) {
    product.scaled = product.count;
    product.back[0] = h.back, product.back[1] = b.back;
  }
}

// y's segments: those whose sums are multiplied come first.
template <class T>
void add_base(Product<T>& y, const Matrix<T>& x, const Weight<T>& weight) {
  if (weight.stored.data) y.segments[y.count++] = {x, weight.stored};
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
  Packs<T> packs(scratch);
  const Split<T> A = packs.split(call.lora_A, call.r, K, Remainder::kApart);
  const Split<T> B = layout == BLayout::kRows
                         ? packs.split_transposed(call.lora_B, N, call.r, place)
                         : packs.split(call.lora_B, N, call.r, place);
  packs.launch(stream);
  const Hidden<T> h = hidden<T>(M, call.r, copies(place), survivor(call.dropout), A.back,
                                {call.scaling, call.scaling_factor}, call.h, false, scratch);
  family.down(call.x, A, call.dropout, made_by_pass(h), scratch, stream);
  Product<T> y{};
  if (!kScaled<T>) add_base(y, call.x, call.weight);
  add_segments(y, operand(h, scratch, stream), B, place);
  if (kScaled<T>) add_base(y, call.x, call.weight);
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
  Packs<T> packs(scratch);
  Split<T> A{}, A_of_dx{}, h{};
  if (makes_h || (call.dx && !by_columns)) {
    A = packs.split(call.lora_A, r, K, by_columns ? Remainder::kApart : place);
  }
  A_of_dx = call.dx && by_columns ? packs.split_transposed(call.lora_A, r, K, place) : A;
  const Split<T> B = packs.split(call.lora_B, N, r, Remainder::kApart);
  if (call.dB && call.h) h = packs.split(call.h, M, r, Remainder::kApart);
  packs.launch(stream);
  if (makes_h) {
    const Hidden<T> again =
        hidden<T>(M, r, 1, survivor(call.dropout), A.back, {1.0f, nullptr}, nullptr, true, scratch);
    family.down(call.x, A, call.dropout, made_by_pass(again), scratch, stream);
    h = operand(again, scratch, stream);
  }
  UpGrad<T> up{call.dy, B, h, call.dx || call.dA, {}, gradient<T>(call.dB, scaling, h.back)};
  Hidden<T> dh_of{};
  if (up.wants_dh) {
    dh_of = hidden<T>(M, r, copies(place), survivor(call.dropout), B.back, scaling, nullptr,
                      call.dA, scratch);
    up.dh = made_by_pass(dh_of);
  }
  Gradients<T> left;
  family.up_grad(up, left, scratch, stream);
  Split<T> dh{};
  if (up.wants_dh) dh = operand(dh_of, scratch, stream);
  KeptBits kept{};
  if (call.dA) {
    if (call.dx && call.dropout.drops()) kept = KeptBits::allocate(M, K, scratch);
    family.down_grad(call.x, dh.columns(0, r), call.dropout, kept,
                     gradient<T>(call.dA, {1.0f, nullptr}, dh.back), left, scratch, stream);
  }
  left.launch(stream);
  if (call.dx) {
    Product<T> dx{};
    add_segments(dx, dh, A_of_dx, place);
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
  Packs<T> packs(scratch);
  const Split<T> B = packs.split(call.lora_B, N, r, Remainder::kApart);
  Split<T> h{};
  if (call.dB) h = packs.split(call.h, M, r, Remainder::kApart);
  packs.launch(stream);
  Hidden<T> dh = float_hidden<T>(M, r, call.scaling, call.dh);
  dh.back = B.back;
  const Gradient<T> dB = gradient<T>(call.dB, {call.scaling, nullptr}, h.back);
  Gradients<T> left;
  family.up_grad({call.dy, B, h, call.dh != nullptr, dh, dB}, left, scratch, stream);
  left.launch(stream);
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
