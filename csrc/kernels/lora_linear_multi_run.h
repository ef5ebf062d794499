// Forward and backward of layers of one x (lora_linear_multi.h), out of the passes of a family: x
// is read once for the low-rank parts of all layers, whose adapters lie beside each other along the
// rank; the products of forward are one launch, and dx is one product. Host code without torch.
#pragma once

#include <algorithm>

#include "lora_linear_multi.h"
#include "lora_linear_run.h"

namespace lora_ext {

// Where the layers' ranks begin that lie beside each other, each filled up with zeros.
struct StackedRanks {
  bool has[kMostTogether] = {};
  int64_t first[kMostTogether] = {}, total = 0;

  void add(size_t layer, int64_t r) {
    has[layer] = true, first[layer] = total;
    total += joined_rank(r);
  }
};

// Their lora_A as one matrix, [total, K] or, transposed, [K, total].
template <class T, class TA, class Call>
Split<T> stacked_A(std::span<const Call> calls, const StackedRanks& ranks, int64_t K,
                   bool transposed, Packs<T>& packs, const Allocator& scratch) {
  const int64_t stride = transposed ? ranks.total : round_up(K, 8);
  const int64_t rows = transposed ? K : ranks.total, columns = transposed ? ranks.total : K;
  T* const value = scratch.get<T>(rows * stride);
  T* const remainder = kSame<T, TA> ? nullptr : scratch.get<T>(rows * stride);
  constexpr bool kMeasured = kScaled<T> && !kSame<T, TA>;
  const auto adapters = static_cast<int>(std::count(ranks.has, ranks.has + calls.size(), true));
  const Range range = kMeasured ? packs.range_of(adapters) : Range{};
  int measured = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!ranks.has[i]) continue;
    const int64_t r = calls[i].r, padded = joined_rank(r);
    const int64_t begin = ranks.first[i] * (transposed ? 1 : stride);
    const PackJob<T> job{.in = calls[i].lora_A,
                         .in_float = !kSame<T, TA>,
                         .rows = transposed ? K : r,
                         .columns = transposed ? r : K,
                         .row_step = transposed ? 1 : K,
                         .column_step = transposed ? K : 1,
                         .padded_rows = transposed ? K : padded,
                         .padded_columns = transposed ? padded : stride,
                         .stride = stride,
                         .value = value + begin,
                         .remainder = remainder ? remainder + begin : nullptr,
                         .range = range};
    if constexpr (kMeasured) packs.measure(job, measured++);
    packs.add(job);
  }
  return {{value, rows, columns, stride}, remainder, range.back};
}

template <class T>
BLayout layout_of(const Weight<T>& weight, bool backward) {
  return weight.transposed == backward ? BLayout::kColumns : BLayout::kRows;
}

// h of layers without dropout is one pass over x; with it each has x of its own.
template <class T, class TA>
void multi_forward(const Family<T>& family, std::span<const ForwardCall<T, TA>> calls,
                   const Allocator& scratch, Stream stream) {
  const Matrix<T>& x = calls[0].x;
  const int64_t M = x.rows, K = x.columns;
  const BLayout layout = layout_of(calls[0].weight, false);
  StackedRanks ranks;
  Split<T> A[kMostTogether] = {}, B[kMostTogether] = {}, stacked{};
  Packs<T> packs(scratch);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall<T, TA>& call = calls[i];
    const int64_t r = call.r, N = call.weight.N();
    if (r == 0) continue;
    const Remainder place = joined<T, TA>(r, layout);
    B[i] = layout == BLayout::kRows ? packs.split_transposed(call.lora_B, N, r, place)
                                    : packs.split(call.lora_B, N, r, place);
    if (call.dropout.enabled) {
      A[i] = packs.split(call.lora_A, r, K, Remainder::kApart);
    } else {
      ranks.add(i, r);
    }
  }
  if (ranks.total > 0) stacked = stacked_A<T, TA>(calls, ranks, K, false, packs, scratch);
  packs.launch(stream);

  float* const shared = ranks.total > 0 ? scratch.get<float>(M * ranks.total) : nullptr;
  if (shared) {
    Hidden<T> of_all = float_hidden<T>(M, ranks.total, 1.0f, shared);
    of_all.back = stacked.back;
    family.down(x, stacked, Dropout{}, of_all, scratch, stream);
  }
  Product<T> y[kMostTogether] = {};
  JobList<FinishJob<T>> finishes;
  Packs<T> operands(scratch);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall<T, TA>& call = calls[i];
    const bool low_rank_first = kScaled<T> && call.r > 0;
    if (!low_rank_first) add_base(y[i], x, call.weight);
    y[i].bias = call.bias;
    y[i].out = call.y, y[i].M = M, y[i].N = call.weight.N();
    if (call.r == 0) continue;
    const Remainder place = joined<T, TA>(call.r, layout);
    const Hidden<T> whole = hidden<T>(M, call.r, copies(place), survivor(call.dropout), A[i].back,
                                      {call.scaling, call.scaling_factor}, call.h, false, scratch);
    const Hidden<T> h = made_by_pass(whole);
    if (ranks.has[i]) {
      finishes.add({shared + ranks.first[i], 1, ranks.total, h}, M * h.padded);
    } else {
      family.down(x, A[i], call.dropout, h, scratch, stream);
    }
    const Range range = operands.range_of(1);
    add_operand(operands, whole, range);
    add_segments(y[i], operand(whole, range), B[i], place);
    if (low_rank_first) add_base(y[i], x, call.weight);
  }
  finishes.launch(lora_linear_finish_kernel<T>, stream);
  operands.launch(stream);
  for (Product<T>& one : y) one.aligned = aligned(one);
  family.products({y, static_cast<int>(calls.size())}, layout, stream);
}

// dh of all layers lies beside each other, as lora_A does: dA is one pass over x, and dx the
// product of both and of each layer's dy and weight.
template <class T, class TA>
void multi_backward(const Family<T>& family, std::span<const BackwardCall<T, TA>> calls,
                    const Allocator& scratch, Stream stream) {
  T* const out = calls[0].dx;
  const int64_t M = calls[0].dy.rows, K = calls[0].weight.K();
  const BLayout layout = layout_of(calls[0].weight, true);
  StackedRanks ranks;
  Split<T> B[kMostTogether] = {}, h[kMostTogether] = {}, A{}, dh{};
  Packs<T> packs(scratch);
  Matrix<T> x{};
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall<T, TA>& call = calls[i];
    if (call.r == 0) continue;
    if (out || call.dA) ranks.add(i, call.r);
    if (call.dA) x = call.x;
    B[i] = packs.split(call.lora_B, call.dy.columns, call.r, Remainder::kApart);
    if (call.dB) h[i] = packs.split(call.h, M, call.r, Remainder::kApart);
  }
  if (out && ranks.total > 0) {
    A = stacked_A<T, TA>(calls, ranks, K, layout == BLayout::kColumns, packs, scratch);
  }
  packs.launch(stream);

  T* const value = scratch.get<T>(M * ranks.total);
  T* const remainder = x.data ? scratch.get<T>(M * ranks.total) : nullptr;
  Packs<T> operands(scratch);
  const auto adapters = static_cast<int>(std::count(ranks.has, ranks.has + calls.size(), true));
  const Range range = operands.range_of(adapters);
  dh = {{value, M, ranks.total, ranks.total}, remainder, range.back};
  int measured = 0;
  Gradients<T> left;
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall<T, TA>& call = calls[i];
    if (!ranks.has[i] && !call.dB) continue;
    const HiddenFactor scaling{call.scaling, call.scaling_factor};
    UpGrad<T> up{call.dy, B[i], h[i], ranks.has[i], {}, gradient<T>(call.dB, scaling, h[i].back)};
    if (up.wants_dh) {
      const int64_t first = ranks.first[i];
      up.dh = float_hidden<T>(M, call.r, 1.0f, nullptr);
      up.dh.stride = ranks.total, up.dh.scaling = scaling;
      up.dh.value = value + first;
      up.dh.remainder = remainder ? remainder + first : nullptr;
      up.dh.back = B[i].back;
      if (kScaled<T>) up.dh.sums = scratch.get<float>(M * call.r);
    }
    const Hidden<T> own = up.dh;
    up.dh = made_by_pass(own);
    family.up_grad(up, left, scratch, stream);
    if (up.wants_dh) add_operand(operands, own, range, measured++);
  }
  operands.launch(stream);

  if (x.data) {
    float* const dA = scratch.get<float>(ranks.total * K);
    const HiddenFactor one{1.0f, nullptr};
    family.down_grad(x, dh, Dropout{}, KeptBits{}, gradient<T>(dA, one, dh.back), left, scratch,
                     stream);
    left.launch(stream);
    for (size_t i = 0; i < calls.size(); ++i) {
      if (!calls[i].dA) continue;
      left.add({dA + ranks.first[i] * K, 1}, calls[i].r * K,
               gradient<T>(calls[i].dA, one, nullptr));
    }
  }
  left.launch(stream);
  if (!out) return;
  Product<T> dx{};
  if (ranks.total > 0) add_segments(dx, dh, A, Remainder::kApart);
  for (const BackwardCall<T, TA>& call : calls) {
    dx.segments[dx.count++] = {call.dy, call.weight.stored};
  }
  dx.out = out, dx.M = M, dx.N = K;
  launch_product(family, dx, layout, stream);
}

template <class T, class TA>
void run_multi_forward(std::span<const ForwardCall<T, TA>> calls, const Allocator& scratch,
                       Stream stream, KernelFamily family) {
  multi_forward(passes_of<T>(family), calls, scratch, stream);
}

template <class T, class TA>
void run_multi_backward(std::span<const BackwardCall<T, TA>> calls, const Allocator& scratch,
                        Stream stream, KernelFamily family) {
  multi_backward(passes_of<T>(family), calls, scratch, stream);
}

}  // namespace lora_ext
