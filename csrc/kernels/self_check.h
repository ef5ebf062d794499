// Whether the kernels of a family compute what they should on the GPU at hand, which may be one
// that nobody has tried. Host code without CUDA's headers.
//
// Every value is a small whole number and dropout keeps half, so that all sums are exact in float,
// whatever their order, and each result is rounded once: it is right to the bit, or it is wrong.
#pragma once

#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lora_linear_grouped.h"
#include "lora_linear_multi.h"

namespace lora_ext {

struct SelfCheckSize {
  int64_t M, N, K;
};
// Several rows of tiles with tails; wide results and narrow ones, which have tiles of other widths.
constexpr SelfCheckSize kSelfCheckSizes[] = {{2056, 2056, 264}, {2056, 264, 2056}};

// Copies between host and device, after all work of the stream before, and waits for it.
using CopyAndWait = std::function<void(void* to, const void* from, int64_t bytes)>;

class SelfCheck {
 public:
  SelfCheck(SelfCheckSize size, const Allocator& memory, const CopyAndWait& copy)
      : M_(size.M), N_(size.N), K_(size.K), memory_(memory), copy_(copy) {
    fill(x_, M_ * K_), fill(weight_, N_ * K_), fill(bias_, N_), fill(A_, kRank * K_);
    fill(B_, N_ * kRank), fill(dy_, M_ * N_);
  }

  // What is wrong; empty if nothing is. Throws std::runtime_error if a kernel cannot be launched.
  std::string run(KernelFamily family, Stream stream) {
    const Dropout dropout{true, kThreshold, 1.0f / kKept, to_device(kRngState, 2)};
    const auto* x = halves(x_);
    const auto* weight = halves(weight_);
    const auto* A = halves(A_);
    const auto* B = halves(B_);
    const auto* dy = halves(dy_);
    auto* const y = memory_.get<Bf16>(M_ * N_);
    auto* const h = memory_.get<float>(M_ * kRank);
    const ForwardCall<Bf16, Bf16> forward{.x = {x, M_, K_, K_},
                                          .weight = {{weight, N_, K_, K_}},
                                          .bias = floats(bias_),
                                          .lora_A = A,
                                          .lora_B = B,
                                          .r = kRank,
                                          .scaling = kKept,
                                          .scaling_factor = nullptr,
                                          .dropout = dropout,
                                          .y = y,
                                          .h = h};
    run_forward(forward, memory_, stream, family);
    auto* const dx = memory_.get<Bf16>(M_ * K_);
    auto* const dA = memory_.get<Bf16>(kRank * K_);
    auto* const dB = memory_.get<Bf16>(N_ * kRank);
    const BackwardCall<Bf16, Bf16> backward{.dy = {dy, M_, N_, N_},
                                            .x = {x, M_, K_, K_},
                                            .weight = {{weight, N_, K_, K_}},
                                            .h = h,
                                            .lora_A = A,
                                            .lora_B = B,
                                            .r = kRank,
                                            .scaling = kKept,
                                            .scaling_factor = nullptr,
                                            .dropout = dropout,
                                            .dx = dx,
                                            .dA = dA,
                                            .dB = dB};
    run_backward(backward, memory_, stream, family);
    check_rows("y", y, N_, [&](int64_t m, int64_t n) { return expected_y(m, n); });
    check_rows("dx", dx, K_, [&](int64_t m, int64_t k) { return expected_dx(m, k); });
    check_gradients(dA, dB);
    if (wrong_.empty()) run_together(forward, backward, family, stream);
    if (wrong_.empty()) run_few_rows(forward, family, stream);
    if (wrong_.empty() && family == KernelFamily::Sm80) run_grouped(forward, backward, stream);
    return wrong_;
  }

 private:
  // Every second row, from the last one, has this adapter, and the others have it without dropout;
  // what they are added to is 0.
  void run_grouped(const ForwardCall<Bf16, Bf16>& forward, const BackwardCall<Bf16, Bf16>& backward,
                   Stream stream) {
    std::vector<int> order;
    for (int64_t parity = 0; parity < 2; ++parity) {
      for (int64_t m = M_ - 1; m >= 0; --m) {
        if (m % 2 == parity) order.push_back(static_cast<int>(m));
      }
    }
    GroupedAdapter adapters[2];
    for (int64_t parity = 0; parity < 2; ++parity) {
      adapters[parity] = {.lora_A = forward.lora_A,
                          .lora_B = forward.lora_B,
                          .lora_bias = nullptr,
                          .in_float = false,
                          .r = kRank,
                          .rows = (M_ + 1 - parity) / 2,
                          .scaling = parity == 0 ? kKept : 1.0f,
                          .dropout = parity == 0 ? forward.dropout : Dropout{}};
    }
    adapters[0].dA = backward.dA, adapters[0].dB = backward.dB;
    const GroupedRows rows{adapters, to_device(order.data(), M_), nullptr};
    auto* const y = const_cast<Bf16*>(halves(Values(static_cast<size_t>(M_ * N_))));
    auto* const dx = const_cast<Bf16*>(halves(Values(static_cast<size_t>(M_ * K_))));
    run_grouped_forward<Bf16>({rows, forward.x, y, N_, forward.h}, memory_, stream);
    run_grouped_backward<Bf16>({rows, backward.dy, backward.x, nullptr, K_, dx, nullptr}, memory_,
                               stream);
    check_rows("y of several adapters", y, N_, [&](int64_t m, int64_t n) {
      if (n == 0) low_rank_ = h_of(m, m % 2 == 0);
      return low_rank_y(n);
    });
    check_rows("dx of several adapters", dx, K_, [&](int64_t m, int64_t k) {
      if (k == 0) low_rank_ = dh_of(m, N_), kept_ = kept(m);
      return m % 2 == 0 && !kept_[k] ? 0 : low_rank_dx(k);
    });
    check_gradients(backward.dA, backward.dB, 2);
  }
  int low_rank_y(int64_t n) const {
    int sum = 0;
    for (int j = 0; j < kRank; ++j) sum += low_rank_[j] * B_[n * kRank + j];
    return sum;
  }
  int low_rank_dx(int64_t k) const {
    int sum = 0;
    for (int j = 0; j < kRank; ++j) sum += low_rank_[j] * A_[j * K_ + k];
    return sum;
  }

  // The first rows alone, without dropout, which are another kernel's.
  void run_few_rows(ForwardCall<Bf16, Bf16> forward, KernelFamily family, Stream stream) {
    forward.x.rows = kFewRows, forward.dropout = {}, forward.scaling = 1.0f;
    forward.y = memory_.get<Bf16>(kFewRows * N_), forward.h = nullptr;
    run_forward(forward, memory_, stream, family);
    check_rows(
        "y of few rows", forward.y, N_,
        [&](int64_t m, int64_t n) { return expected_y(m, n, false); }, kFewRows);
  }
  // Beside this layer one of its first columns, and without dropout the dx of both.
  void run_together(ForwardCall<Bf16, Bf16> forward, BackwardCall<Bf16, Bf16> backward,
                    KernelFamily family, Stream stream) {
    const int64_t few = few_columns();
    ForwardCall<Bf16, Bf16> forwards[] = {forward, forward};
    forwards[1].weight.stored.rows = few;
    for (auto& [call, columns] : {std::pair(&forwards[0], N_), std::pair(&forwards[1], few)}) {
      call->y = memory_.get<Bf16>(M_ * columns), call->h = nullptr;
    }
    run_multi_forward<Bf16, Bf16>(forwards, memory_, stream, family);
    backward.dropout = {}, backward.scaling = 1.0f;
    backward.dA = backward.dB = nullptr;
    BackwardCall<Bf16, Bf16> backwards[] = {backward, backward};
    backwards[1].weight.stored.rows = backwards[1].dy.columns = few;
    run_multi_backward<Bf16, Bf16>(backwards, memory_, stream, family);
    const auto expected = [&](int64_t m, int64_t n) { return expected_y(m, n); };
    check_rows("y of two layers", forwards[0].y, N_, expected);
    check_rows("y of the second layer", forwards[1].y, few, expected);
    check_rows("dx of two layers", backward.dx, K_,
               [&](int64_t m, int64_t k) { return expected_dx_of_both(m, k); });
  }
  int64_t few_columns() const { return (N_ / 2 + 7) / 8 * 8; }

  static constexpr int kRank = 24;
  static constexpr int64_t kFewRows = 40;
  static constexpr float kKept = 0.5f;  // of x; the scaling, too: they make up for each other
  static constexpr uint32_t kThreshold = 32768;
  static constexpr int64_t kRngState[2] = {12345678901, 44};

  using Values = std::vector<int8_t>;

  // -1, 0 and 1
  void fill(Values& values, int64_t count) {
    values.resize(static_cast<size_t>(count));
    for (int8_t& value : values) {
      state_ = state_ * 1664525u + 1013904223u;
      value = static_cast<int8_t>((state_ >> 16) % 3 - 1);
    }
  }

  template <class E>
  const E* to_device(const E* values, int64_t count) {
    auto* const place = memory_.get<E>(count);
    copy_(place, values, count * static_cast<int64_t>(sizeof(E)));
    return place;
  }
  const float* floats(const Values& values) {
    const std::vector<float> converted(values.begin(), values.end());
    return to_device(converted.data(), static_cast<int64_t>(converted.size()));
  }
  const Bf16* halves(const Values& values) {
    std::vector<Bf16> converted(values.size());
    for (size_t i = 0; i < values.size(); ++i) converted[i] = of_number(values[i]);
    return to_device(converted.data(), static_cast<int64_t>(converted.size()));
  }

  // Rounded to nearest even, as element.h does on the device.
  static Bf16 of_number(double number) {
    const auto value = static_cast<float>(number);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
  }

  // ---- What is expected ------------------------------------------------------------------------

  // Which elements of a row of x dropout keeps: eight for each draw.
  std::vector<bool> kept(int64_t m) const {
    std::vector<bool> row(static_cast<size_t>((K_ + kDropoutBlock - 1) / kDropoutBlock) *
                          kDropoutBlock);
    for (int64_t first = 0; first < K_; first += kDropoutBlock) {
      for (int lane = 0; lane < kDropoutLanes; ++lane) {
        const PhiloxBlock bits =
            dropout_bits(dropout_rng(kRngState), m, first / kDropoutBlock, lane);
        for (int slot = 0; slot < kDropoutSlots; ++slot) {
          row[first + slot * kDropoutLanes + lane] = keeps(bits, slot, kThreshold);
        }
      }
    }
    return row;
  }
  std::vector<int> row_of_x(int64_t m) const {
    return {x_.begin() + m * K_, x_.begin() + (m + 1) * K_};
  }
  // A row of x without what is dropped; the factor of what is kept is the scaling's inverse.
  std::vector<int> dropped(int64_t m) const {
    const std::vector<bool> keep = kept(m);
    std::vector<int> row = row_of_x(m);
    for (int64_t k = 0; k < K_; ++k) row[k] = keep[k] ? row[k] : 0;
    return row;
  }
  // Of one row, of h and dh times the scaling: the factor of what is kept makes up for it.
  std::vector<int> h_of(int64_t m, bool drops) const {
    const std::vector<int> x = drops ? dropped(m) : row_of_x(m);
    std::vector<int> row(kRank);
    for (int j = 0; j < kRank; ++j) {
      for (int64_t k = 0; k < K_; ++k) row[j] += x[k] * A_[j * K_ + k];
    }
    return row;
  }
  std::vector<int> dh_of(int64_t m, int64_t columns) const {
    std::vector<int> row(kRank);
    for (int64_t n = 0; n < columns; ++n) {
      const int value = dy_[m * N_ + n];
      for (int j = 0; value != 0 && j < kRank; ++j) row[j] += value * B_[n * kRank + j];
    }
    return row;
  }

  double expected_y(int64_t m, int64_t n, bool drops = true) {
    if (n == 0) low_rank_ = h_of(m, drops);
    int sum = bias_[n];
    for (int64_t k = 0; k < K_; ++k) sum += x_[m * K_ + k] * weight_[n * K_ + k];
    return sum + low_rank_y(n);
  }
  double expected_dx(int64_t m, int64_t k) {
    if (k == 0) low_rank_ = dh_of(m, N_), kept_ = kept(m);
    int sum = 0;
    for (int64_t n = 0; n < N_; ++n) sum += dy_[m * N_ + n] * weight_[n * K_ + k];
    return kept_[k] ? sum + low_rank_dx(k) : sum;
  }

  double expected_dx_of_both(int64_t m, int64_t k) {
    const int64_t few = few_columns();
    if (k == 0) {
      low_rank_ = dh_of(m, N_);
      const std::vector<int> second = dh_of(m, few);
      for (int j = 0; j < kRank; ++j) low_rank_[j] += second[j];
    }
    int sum = 0;
    for (int64_t n = 0; n < N_; ++n)
      sum += (n < few ? 2 : 1) * dy_[m * N_ + n] * weight_[n * K_ + k];
    return sum + low_rank_dx(k);
  }

  // ---- What is found ---------------------------------------------------------------------------

  void compare(const char* name, int64_t row, int64_t column, Bf16 got, double number) {
    const Bf16 expected = of_number(number);
    const bool zero = ((got.bits | expected.bits) & 0x7FFF) == 0;
    if (got.bits == expected.bits || zero || !wrong_.empty()) return;
    const auto value = [](Bf16 half) {
      const uint32_t bits = uint32_t{half.bits} << 16;
      float out;
      memcpy(&out, &bits, sizeof(out));
      return std::to_string(out);
    };
    wrong_ = std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(column) +
             "] of a check with M = " + std::to_string(M_) + ", N = " + std::to_string(N_) +
             ", K = " + std::to_string(K_) + " is " + value(got) + ", expected " + value(expected);
  }

  std::vector<Bf16> from_device(const Bf16* values, int64_t count) const {
    std::vector<Bf16> host(static_cast<size_t>(count));
    copy_(host.data(), values, count * 2);
    return host;
  }

  // A few rows by value, all elements for being finite.
  template <class Expected>
  void check_rows(const char* name, const Bf16* device, int64_t columns, const Expected& expected) {
    check_rows(name, device, columns, expected, M_);
  }
  template <class Expected>
  void check_rows(const char* name, const Bf16* device, int64_t columns, const Expected& expected,
                  int64_t rows) {
    const std::vector<Bf16> found = from_device(device, rows * columns);
    for (const int64_t row : {int64_t{0}, int64_t{63}, int64_t{130}, rows / 2, rows - 1}) {
      for (int64_t column = 0; row < rows && column < columns; ++column) {
        compare(name, row, column, found[row * columns + column], expected(row, column));
      }
    }
    for (int64_t i = 0; i < rows * columns; ++i) {
      const bool finite = (found[i].bits & 0x7F80) != 0x7F80;
      if (!finite) compare(name, i / columns, i % columns, found[i], 0);
    }
  }

  // Of the first rank and the last: all sums over the rows, or every so many of them.
  void check_gradients(const Bf16* dA, const Bf16* dB, int64_t step = 1) {
    const std::vector<Bf16> found_A = from_device(dA, kRank * K_);
    const std::vector<Bf16> found_B = from_device(dB, N_ * kRank);
    constexpr int kRanks[] = {0, kRank - 1};
    std::vector<double> want_A[2], want_B[2];
    for (int i = 0; i < 2; ++i) {
      want_A[i].resize(static_cast<size_t>(K_)), want_B[i].resize(static_cast<size_t>(N_));
    }
    for (int64_t m = 0; m < M_; m += step) {
      const std::vector<int> x = dropped(m);
      const int8_t* const dy = &dy_[m * N_];
      for (int i = 0; i < 2; ++i) {
        const int j = kRanks[i];
        int h = 0, dh = 0;
        for (int64_t k = 0; k < K_; ++k) h += x[k] * A_[j * K_ + k];
        for (int64_t n = 0; n < N_; ++n) dh += dy[n] * B_[n * kRank + j];
        for (int64_t k = 0; k < K_; ++k) want_A[i][k] += dh * x[k];
        for (int64_t n = 0; n < N_; ++n) want_B[i][n] += h * dy[n];
      }
    }
    for (int i = 0; i < 2; ++i) {
      const int j = kRanks[i];
      for (int64_t k = 0; k < K_; ++k) compare("dA", j, k, found_A[j * K_ + k], want_A[i][k]);
      for (int64_t n = 0; n < N_; ++n) compare("dB", n, j, found_B[n * kRank + j], want_B[i][n]);
    }
  }

  int64_t M_, N_, K_;
  Allocator memory_;
  CopyAndWait copy_;
  uint32_t state_ = 1;
  Values x_, weight_, bias_, A_, B_, dy_;
  std::vector<int> low_rank_;  // of the row that is compared, as what it keeps
  std::vector<bool> kept_;
  std::string wrong_;
};

}  // namespace lora_ext
