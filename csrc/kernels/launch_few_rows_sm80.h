// Launches few_rows_sm80.h's kernel. Host code without torch.
#pragma once

#include "few_rows_sm80.h"
#include "switches.h"

namespace lora_ext::sm80 {

constexpr int kFewRowsCluster = 4;  // blocks

// Columns of y for a cluster of `splits` blocks: as few rows of x, A and the weight as possible for
// the busiest multiprocessor, of as many columns as its shared memory has room for. `at_once`:
// clusters that run at the same time.
template <class TA, class Shape>
int few_rows_columns(int64_t M, int64_t N, int r, int64_t at_once, int most_shared_bytes) {
  constexpr int kEach = 8 * Shape::kSplits, kOfA = sizeof(TA) / 2;
  int best = 0;
  int64_t fewest = 0;
  for (int columns = kEach; columns <= Shape::kMostColumns; columns += kEach) {
    if (few_rows_sizes<TA, Shape>(columns, r).shared_bytes > most_shared_bytes) break;
    const int64_t turns = ceil_div(ceil_div(N, columns), at_once);
    const int64_t rows = turns * (columns + kOfA * r + M);
    if (best == 0 || rows < fewest) best = columns, fewest = rows;
  }
  return best;
}

constexpr int kSharedBytesSm90 = 227 * 1024;

template <class T, class TA, int kRows, int kSplits>
void launch_few_rows_of(FewRowsParams<T, TA> params, Stream stream) {
  using Shape = FewRowsShape<kRows, kSplits>;
  static_assert(
      few_rows_have_room<TA, kSplits>(kSplits > 1 ? kSharedBytesSm90 : kLeastSharedBytes));
  const auto kernel = few_rows_sm80_kernel<T, TA, Shape>;
  const int64_t M = params.x.rows, N = params.weight.rows;
  const int most = arch::most_shared_bytes();
  // With as much shared memory as there is: they need most of it.
  const int64_t at_once = kSplits == 1
                              ? arch::multiprocessors()
                              : arch::clusters_at_once(kernel, Shape::kThreads, most, kSplits);
  params.columns = few_rows_columns<TA, Shape>(M, N, params.r, at_once, most);
  const dim3 grid(static_cast<unsigned>(ceil_div(N, params.columns) * kSplits));
  params.sizes = few_rows_sizes<TA, Shape>(params.columns, params.r);
  arch::launch_dependent(kernel, grid, Shape::kThreads, params.sizes.shared_bytes, stream, params,
                         kSplits);
}

template <class T, class TA>
bool takes_few_rows(const ForwardCall<T, TA>& call, KernelFamily family) {
  const bool aligned = call.x.aligned() && call.weight.stored.aligned() &&
                       call.x.columns % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(call.lora_A) % 16 == 0;
  return few_rows_fit(call.x.rows, call.weight.N(), call.r, sizeof(TA) == sizeof(float),
                      call.dropout.enabled, few_rows_family(family)) &&
         aligned && call.weight.stored.data != nullptr && !call.weight.transposed;
}

template <class T, class TA>
void launch_few_rows(const ForwardCall<T, TA>& call, Stream stream, KernelFamily family) {
  const FewRowsParams<T, TA> params{.x = call.x,
                                    .weight = call.weight.stored,
                                    .bias = call.bias,
                                    .lora_A = call.lora_A,
                                    .lora_B = call.lora_B,
                                    .r = call.r,
                                    .columns = 0,
                                    .sizes = {},
                                    .scaling = {call.scaling, call.scaling_factor},
                                    .y = call.y,
                                    .h = call.h};
  const auto of_rows = [&](auto splits) {
    constexpr int kSplits = decltype(splits)::value;
    if (call.x.rows <= 16) return launch_few_rows_of<T, TA, 16, kSplits>(params, stream);
    if (call.x.rows <= 32) return launch_few_rows_of<T, TA, 32, kSplits>(params, stream);
    launch_few_rows_of<T, TA, 64, kSplits>(params, stream);
  };
#if defined(LORA_EXT_SM90)
  if (few_rows_family(family) == KernelFamily::Sm90) {
    return of_rows(std::integral_constant<int, kFewRowsCluster>{});
  }
#endif
  static_cast<void>(family);
  of_rows(std::integral_constant<int, 1>{});
}

}  // namespace lora_ext::sm80
