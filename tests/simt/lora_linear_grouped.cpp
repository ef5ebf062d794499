// lora_linear_grouped's launchers and kernels, run by the emulator, as plain C functions:
// tests/emulated_grouped.py loads them with ctypes and passes the addresses of CPU tensors.
#include "cuda/lora_linear_grouped_path.h"
#include "kernels/lora_linear_grouped_run.h"
#include "kernels/write_table.cu"
#include "launched.h"

using namespace lora_ext;
using simt_test::guarded, simt_test::message, simt_test::Scratch;

namespace {

struct AdapterArguments {
  const void *lora_A, *lora_B, *lora_bias;
  void *dA, *dB, *dlora_bias;
  int64_t rows;
  int in_float, r;
  float scaling;
  int dropout;
  uint32_t threshold;
  float survivor;
};

struct Arguments {
  int64_t M, N, K;
  int64_t ldx, ldy;
  const AdapterArguments* adapters;
  int64_t count;
  const int* order;
  const int64_t* rounds;  // [round_count, 3]: adapter, round, rows
  int64_t round_count;
  const float* factor;
  const int64_t* rng_state;
  const void *x, *dy;
  void *y, *dx;
  float* h;
  const float* saved_h;
  float* dfactor;
  int asked;  // for the kernels, by LORA_EXT_CUDA_PATH
};

GroupedPath& path() {
  static GroupedPath value{};
  return value;
}

std::vector<GroupedAdapter> adapters_of(const Arguments& a) {
  std::vector<GroupedAdapter> adapters;
  for (int64_t i = 0; i < a.count; ++i) {
    const AdapterArguments& one = a.adapters[i];
    adapters.push_back({one.lora_A,
                        one.lora_B,
                        one.lora_bias,
                        one.in_float != 0,
                        one.r,
                        one.rows,
                        one.scaling,
                        {one.dropout != 0, one.threshold, one.survivor, a.rng_state},
                        one.dA,
                        one.dB,
                        one.dlora_bias});
  }
  return adapters;
}

std::vector<GroupedRound> rounds_of(const Arguments& a) {
  std::vector<GroupedRound> rounds;
  for (int64_t i = 0; i < a.round_count; ++i) {
    const int64_t* one = a.rounds + 3 * i;
    rounds.push_back({static_cast<int>(one[0]), one[1], one[2]});
  }
  return rounds;
}

// As csrc/cuda/lora_linear_grouped.cpp chooses on the GPU of simt::options(); false: no kernel
// runs.
template <class T>
bool choose(const Arguments& a, bool backward) {
  const CudaWish wish = a.asked ? CudaWish::Hybrid : CudaWish::Auto;
  CudaCall call{};
  call.backward = backward, call.half = true;
  call.M = a.M, call.N = a.N, call.K = a.K, call.r = 1;
  for (int64_t i = 0; i < a.count; ++i) call.r = std::max<int64_t>(call.r, a.adapters[i].r);
  call.rows = rows_of_sizes(a.N, a.K);
  if (a.x) call.rows = std::min(call.rows, rows_of(a.x, a.M, a.ldx, a.K));
  if (a.dy) call.rows = std::min(call.rows, rows_of(a.dy, a.M, a.ldy, a.N));
  constexpr bool kFp16 = std::is_same_v<T, Fp16>;
  path() = choose_grouped_path(call, kFp16, simt::options().compute_capability, true, wish, false);
  return path().kernels;
}

template <class T>
void forward(const Arguments& a) {
  if (!choose<T>(a, false)) return;
  const std::vector<GroupedAdapter> adapters = adapters_of(a);
  const std::vector<GroupedRound> rounds = rounds_of(a);
  Scratch scratch;
  const GroupedForwardCall<T> call{.rows = {adapters, a.order, a.factor, rounds},
                                   .x = {static_cast<const T*>(a.x), a.M, a.K, a.ldx},
                                   .y = static_cast<T*>(a.y),
                                   .N = a.N,
                                   .h = a.h};
  run_grouped_forward(call, {Scratch::allocate, &scratch}, nullptr);
}

template <class T>
void backward(const Arguments& a) {
  if (!choose<T>(a, true)) return;
  const std::vector<GroupedAdapter> adapters = adapters_of(a);
  const std::vector<GroupedRound> rounds = rounds_of(a);
  Scratch scratch;
  const GroupedBackwardCall<T> call{.rows = {adapters, a.order, a.factor, rounds},
                                    .dy = {static_cast<const T*>(a.dy), a.M, a.N, a.ldy},
                                    .x = {static_cast<const T*>(a.x), a.M, a.K, a.ldx},
                                    .h = a.saved_h,
                                    .K = a.K,
                                    .dx = static_cast<T*>(a.dx),
                                    .dfactor = a.dfactor};
  run_grouped_backward(call, {Scratch::allocate, &scratch}, nullptr);
}

}  // namespace

extern "C" {

// 0, or 1 and last_error() says why.
int grouped(int fp16, int is_backward, const Arguments* arguments) {
  return guarded([&] {
#if defined(BF16_ONLY)  // compiled in half of the time
    if (fp16) throw simt::Error("built for a base of bf16 only");
#else
    if (fp16) return is_backward ? backward<Fp16>(*arguments) : forward<Fp16>(*arguments);
#endif
    is_backward ? backward<Bf16>(*arguments) : forward<Bf16>(*arguments);
  });
}

const char* last_path() { return path().name(); }
const char* last_reason() { return path().reason; }
}
