// One lora_linear problem at full size: random matrices, and what each of its results has to be.
#pragma once

#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/lora_linear_run.h"
#include "reference.h"

namespace gpu_bench {

struct Case {
  KernelFamily family;
  int64_t M, K, N;
  int r;
  double dropout_p;
  bool fp32_adapters;
};

// Scratch of one call, taken anew by each: as quick as the host can be.
class Arena {
 public:
  void reserve(int64_t bytes) {
    block_ = memory_.fresh<uint8_t>(static_cast<size_t>(bytes));
    size_ = bytes;
  }
  void reset() { used_ = 0; }
  void poison() { check(cudaMemset(block_, 0xFF, static_cast<size_t>(size_))); }
  static void* allocate(void* context, int64_t bytes) {
    auto* const self = static_cast<Arena*>(context);
    uint8_t* const start = self->block_ + self->used_;
    self->used_ += (bytes + 255) / 256 * 256;
    if (self->used_ > self->size_) throw std::runtime_error("the benchmark's scratch is too small");
    return start;
  }
  Allocator allocator() { return {allocate, this}; }

 private:
  gpu_test::Memory memory_;
  uint8_t* block_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

constexpr float kScaling = 0.5f;
constexpr int kResultRows = 128, kGradientRows = 256;  // of the samples

// The most that rounding to bf16, of eight bits, leaves of a value: the root of the mean square of
// 2^-7 / sqrt(12) just above a power of two.
constexpr double kRounding = 0x1p-7 / 3.4641016;
// A float adapter, h and dh are two bf16 each.
constexpr double kSplit = 1.0 / 65536;
// A sum in float over `depth`: a tensor core adds sixteen products at a time and cuts off what is
// below the last bit of the sum.
inline double of_sum(int64_t depth) { return double(depth) / 16 * 0x1p-22 + 0x1p-20; }

// Matrices and what is expected of one case.
template <class TA>
class Problem {
 public:
  explicit Problem(const Case& wanted) : c(wanted) {
    x = normal<Bf16>(c.M * c.K, 1, 1.0);
    dy = normal<Bf16>(c.M * c.N, 2, 1.0);
    weight = normal<Bf16>(c.N * c.K, 3, 1.0 / std::sqrt(double(c.K)));
    lora_A = normal<TA>(c.r * c.K, 4, 1.0 / std::sqrt(double(c.K)));
    lora_B = normal<TA>(c.N * c.r, 5, 1.0 / std::sqrt(double(c.r)));
    y = memory.fresh<Bf16>(size_t(c.M * c.N));
    dx = memory.fresh<Bf16>(size_t(c.M * c.K));
    h = memory.fresh<float>(size_t(c.M * c.r));
    dA = memory.fresh<TA>(size_t(c.r * c.K));
    dB = memory.fresh<TA>(size_t(c.N * c.r));
    const bool drops = c.dropout_p > 0;
    dropout = {drops, dropout_threshold(c.dropout_p), float(dropout_scale(c.dropout_p)),
               memory.copy(std::vector<int64_t>{1234567890123, 8})};
    // What the busiest call takes: parts of dh or dB for each multiprocessor, the split operands.
    const int64_t widest = c.K > c.N ? c.K : c.N;
    scratch.reserve((int64_t{64} << 20) + 32 * c.r * (4 * widest + 8 * c.M));
    expect();
    prepare();
  }

  const Case c;
  gpu_test::Memory memory;
  Arena scratch;
  Bf16 *x, *dy, *weight, *y, *dx;  // [M, K], [M, N], [N, K], [M, N], [M, K]
  TA *lora_A, *lora_B, *dA, *dB;   // [r, K], [N, r]
  float *h, *saved_h, *dh_float;   // [M, r]: what a forward writes; h and dh as expected
  Dropout dropout;
  Expected base_y, base_dx;                                     // the base products alone
  Expected want_h, want_dh, want_y, want_dx, want_dA, want_dB;  // of dA^T
  Split<Bf16> A, B, scaled_h, split_h, split_dh;                // operands of the single passes
  Remainder of_A, of_B;                                         // where theirs lie

  // NaN into everything that a call writes.
  void poison() {
    const auto fill = [](auto* data, int64_t count) {
      check(cudaMemset(data, 0xFF, static_cast<size_t>(count) * sizeof(*data)));
    };
    fill(y, c.M * c.N), fill(dx, c.M * c.K), fill(h, c.M * c.r);
    fill(dA, c.r * c.K), fill(dB, c.N * c.r);
    scratch.poison();
  }
  Matrix<Bf16> x_matrix() const { return {x, c.M, c.K, c.K}; }
  Matrix<Bf16> dy_matrix() const { return {dy, c.M, c.N, c.N}; }
  Matrix<Bf16> weight_matrix() const { return {weight, c.N, c.K, c.K}; }

 private:
  template <class T>
  T* normal(int64_t count, uint64_t seed, double size) {
    T* const out = memory.fresh<T>(static_cast<size_t>(count));
    fill_normal(out, count, seed, size);
    return out;
  }
  Expected zeros(int64_t rows, int64_t most, int64_t columns) {
    const Sample sample = Sample::of(rows, most);
    double* const sums = memory.fresh<double>(static_cast<size_t>(sample.count * columns));
    check(cudaMemset(sums, 0, static_cast<size_t>(sample.count * columns) * sizeof(double)));
    return {sample, columns, sums};
  }
  float* as_float(const Expected& sums, double scale) {
    float* const out = memory.fresh<float>(static_cast<size_t>(sums.count()));
    launch_elements(to_float_kernel, sums.count(), nullptr,
                    ToFloatParams{sums.sums, sums.count(), scale, out});
    return out;
  }
  template <class A_, class B_>
  void add(const Expected& out, View<A_> a, View<B_> b, int64_t depth, double scale) {
    add_sums(SumParams<A_, B_>{a, b, out.rows, out.columns, depth, scale, out.sums});
  }

  void expect() {
    const auto [M, K, N, r] = std::tuple(c.M, c.K, c.N, int64_t{c.r});
    const double survivor = dropout.enabled ? dropout_scale(c.dropout_p) : 1.0, s = kScaling;
    const Bf16* dropped = x;
    if (dropout.enabled) {
      Bf16* const out = memory.fresh<Bf16>(size_t(M * K));
      launch_elements(drop_kernel, M * K, nullptr, DropParams{x, dropout, M, K, out});
      dropped = out;
    }
    want_h = zeros(M, M, r);
    add(want_h, View<Bf16>{dropped, K, 1}, View<TA>{lora_A, 1, K}, K, survivor);
    want_dh = zeros(M, M, r);
    add(want_dh, View<Bf16>{dy, N, 1}, View<TA>{lora_B, r, 1}, N, s * survivor);
    saved_h = as_float(want_h, 1.0), dh_float = as_float(want_dh, 1.0);

    base_y = zeros(M, kResultRows, N), want_y = zeros(M, kResultRows, N);
    add(base_y, View<Bf16>{x, K, 1}, View<Bf16>{weight, 1, K}, K, 1.0);
    check(cudaMemcpy(want_y.sums, base_y.sums, size_t(want_y.count()) * sizeof(double),
                     cudaMemcpyDeviceToDevice));
    add(want_y, View<float>{saved_h, r, 1}, View<TA>{lora_B, 1, r}, r, s);
    base_dx = zeros(M, kResultRows, K), want_dx = zeros(M, kResultRows, K);
    add(base_dx, View<Bf16>{dy, N, 1}, View<Bf16>{weight, K, 1}, N, 1.0);
    add(want_dx, View<float>{dh_float, r, 1}, View<TA>{lora_A, K, 1}, r, 1.0);
    launch_elements(masked_sum_kernel, want_dx.count(), nullptr,
                    MaskedSumParams{want_dx.sums, base_dx.sums, dropout, want_dx.rows, K});
    want_dB = zeros(N, kGradientRows, r);
    add(want_dB, View<Bf16>{dy, 1, N}, View<float>{saved_h, r, 1}, M, s);
    want_dA = zeros(K, kGradientRows, r);
    add(want_dA, View<Bf16>{dropped, 1, K}, View<float>{dh_float, r, 1}, M, 1.0);
    check(cudaDeviceSynchronize());
  }

  // Operands of the single passes, from what is expected: a wrong pass spoils no other.
  void prepare() {
    const Allocator kept = memory.allocator();
    const int64_t M = c.M, r = c.r;
    of_A = joined<Bf16, TA>(r, BLayout::kRows), of_B = joined<Bf16, TA>(r, BLayout::kColumns);
    Packs<Bf16> packs(kept);
    A = packs.split(lora_A, r, c.K, of_A);
    B = packs.split(lora_B, c.N, r, of_B);
    split_h = packs.split(saved_h, M, r, Remainder::kApart);
    packs.launch(nullptr);
    const auto finished = [&](float* sums, int copies, float scaling, bool wants_remainder) {
      const Hidden<Bf16> out = hidden<Bf16>(M, r, copies, 1.0f, nullptr, {scaling, nullptr},
                                            nullptr, wants_remainder, kept);
      finish(Parts{sums, 1}, out, nullptr);
      return operand(out, Range{});
    };
    scaled_h = finished(saved_h, copies(of_B), kScaling, false);
    split_dh = finished(dh_float, copies(of_A), 1.0f, true);
    check(cudaDeviceSynchronize());
  }
};

}  // namespace gpu_bench
