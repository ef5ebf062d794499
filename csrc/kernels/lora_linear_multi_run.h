// Forward and backward of layers of one x (lora_linear_multi.h), out of the passes of a family: x
// is read once for the low-rank parts of all layers, whose adapters lie beside each other along the
// rank; the products of forward are one launch, and dx is one product. Host code without torch.
#pragma once

#include "lora_linear_multi.h"
#include "lora_linear_run.h"

namespace lora_ext {

// What several layers want of a small kernel, in one launch: blockIdx.y counts them.
template <class Params>
struct Several {
  static constexpr int kMost = 2 * kMostTogether;
  Params of[kMost];
};

template <class Params>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_several_kernel(const __grid_constant__ Several<Params> params) {
  params.of[blockIdx.y].run(element_index());
}

template <class Params>
class Collected {
 public:
  void add(const Params& params, int64_t elements) {
    several_.of[count_++] = params;
    most_ = larger(most_, elements);
  }
  void launch(Stream stream) const {
    if (count_ == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(most_, kElementThreads)),
                    static_cast<unsigned>(count_));
    arch::launch_dependent(lora_linear_several_kernel<Params>, grid, kElementThreads, 0, stream,
                           several_);
  }

 private:
  Several<Params> several_{};
  int count_ = 0;
  int64_t most_ = 0;
};

template <class T, class TA>
struct Packs : Collected<PackParams<T, TA>> {
  Split<T> pack(const PackParams<T, TA>& params) {
    this->add(params, params.elements());
    return params.result();
  }
  // As split and split_transposed of lora_linear_run.h, but that launch() makes the copies.
  Split<T> split(const TA* in, int64_t rows, int64_t columns, Remainder place,
                 const Allocator& scratch) {
    const Split<T> found = as_it_is<T>(in, rows, columns);
    if (found.value.data) return found;
    return pack(packing<T>(in, rows, columns, columns, 1, place, scratch));
  }
  Split<T> split_transposed(const TA* in, int64_t rows, int64_t columns, Remainder place,
                            const Allocator& scratch) {
    return pack(packing<T>(in, columns, rows, 1, columns, place, scratch));
  }
};

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
                   bool transposed, Packs<T, TA>& packs, const Allocator& scratch) {
  const int64_t stride = transposed ? ranks.total : round_up(K, 8);
  const int64_t rows = transposed ? K : ranks.total, columns = transposed ? ranks.total : K;
  T* const value = scratch.get<T>(rows * stride);
  T* const remainder = kSame<T, TA> ? nullptr : scratch.get<T>(rows * stride);
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!ranks.has[i]) continue;
    const int64_t r = calls[i].r, padded = joined_rank(r);
    const int64_t begin = ranks.first[i] * (transposed ? 1 : stride);
    packs.pack({.in = calls[i].lora_A,
                .rows = transposed ? K : r,
                .columns = transposed ? r : K,
                .row_step = transposed ? 1 : K,
                .column_step = transposed ? K : 1,
                .padded_rows = transposed ? K : padded,
                .padded_columns = transposed ? padded : stride,
                .stride = stride,
                .value = value + begin,
                .remainder = remainder ? remainder + begin : nullptr});
  }
  return {{value, rows, columns, stride}, remainder};
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
  Packs<T, TA> packs;
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall<T, TA>& call = calls[i];
    const int64_t r = call.r, N = call.weight.N();
    if (r == 0) continue;
    const Remainder place = joined<T, TA>(r, layout);
    B[i] = layout == BLayout::kRows ? packs.split_transposed(call.lora_B, N, r, place, scratch)
                                    : packs.split(call.lora_B, N, r, place, scratch);
    if (call.dropout.enabled) {
      A[i] = packs.split(call.lora_A, r, K, Remainder::kApart, scratch);
    } else {
      ranks.add(i, r);
    }
  }
  if (ranks.total > 0) stacked = stacked_A(calls, ranks, K, false, packs, scratch);
  packs.launch(stream);

  Parts shared{};
  if (ranks.total > 0) shared = family.down(x, stacked, Dropout{}, scratch, stream);
  Product<T> y[kMostTogether] = {};
  Collected<FinishParams<T>> finishes;
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall<T, TA>& call = calls[i];
    y[i].segments[y[i].count++] = {x, call.weight.stored};
    y[i].bias = call.bias;
    y[i].out = call.y, y[i].M = M, y[i].N = call.weight.N();
    if (call.r == 0) continue;
    const Remainder place = joined<T, TA>(call.r, layout);
    const Parts own = ranks.has[i] ? Parts{shared.data + ranks.first[i], shared.count}
                                   : family.down(x, A[i], call.dropout, scratch, stream);
    FinishParams<T> finish = finishing<T>(own, ranks.has[i] ? ranks.total : call.r, M, call.r,
                                          copies(place), {call.scaling, call.scaling_factor});
    finish.survivor = survivor(call.dropout), finish.sums = call.h;
    finish.value = scratch.get<T>(M * finish.stride);
    finishes.add(finish, M * finish.padded);
    add_segments(y[i], {finish.value, M, finish.padded, finish.stride}, B[i], place);
  }
  finishes.launch(stream);
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
  Packs<T, TA> packs;
  Packs<T, float> packs_of_h;
  Matrix<T> x{};
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall<T, TA>& call = calls[i];
    if (call.r == 0) continue;
    if (out || call.dA) ranks.add(i, call.r);
    if (call.dA) x = call.x;
    B[i] = packs.split(call.lora_B, call.dy.columns, call.r, Remainder::kApart, scratch);
    if (call.dB) h[i] = packs_of_h.split(call.h, M, call.r, Remainder::kApart, scratch);
  }
  if (out && ranks.total > 0) {
    A = stacked_A(calls, ranks, K, layout == BLayout::kColumns, packs, scratch);
  }
  packs.launch(stream), packs_of_h.launch(stream);

  T* const value = scratch.get<T>(M * ranks.total);
  T* const remainder = x.data ? scratch.get<T>(M * ranks.total) : nullptr;
  dh = {{value, M, ranks.total, ranks.total}, remainder};
  Collected<FinishParams<T>> finishes;
  Collected<ReduceParams<TA>> reductions, reductions_of_A;
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall<T, TA>& call = calls[i];
    if (!ranks.has[i] && !call.dB) continue;
    const int64_t N = call.dy.columns, r = call.r, first = ranks.first[i];
    const HiddenFactor scaling{call.scaling, call.scaling_factor};
    const UpGradParts up = family.up_grad({call.dy, B[i], h[i], ranks.has[i]}, scratch, stream);
    if (call.dB) reductions.add(reducing(up.dB, N * r, N * r, scaling, call.dB), N * r);
    if (!ranks.has[i]) continue;
    FinishParams<T> finish = finishing<T>(up.dh, r, M, r, 1, scaling);
    finish.stride = ranks.total;
    finish.value = value + first;
    finish.remainder = remainder ? remainder + first : nullptr;
    finishes.add(finish, M * finish.padded);
  }
  reductions.launch(stream), finishes.launch(stream);

  if (x.data) {
    const Parts parts = family.down_grad(x, dh, Dropout{}, KeptBits{}, scratch, stream);
    for (size_t i = 0; i < calls.size(); ++i) {
      if (!calls[i].dA) continue;
      const int64_t elements = calls[i].r * K;
      const Parts own{parts.data + ranks.first[i] * K, parts.count};
      reductions_of_A.add(
          reducing(own, ranks.total * K, elements, HiddenFactor{1.0f, nullptr}, calls[i].dA),
          elements);
    }
    reductions_of_A.launch(stream);
  }
  if (!out) return;
  Product<T> dx{};
  if (ranks.total > 0) add_segments(dx, dh.value, A, Remainder::kApart);
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
