// csrc/kernels/few_rows_sm80.h against float64, by itself and in clusters.

#define LORA_EXT_SM90

#include "kernels/launch_few_rows_sm80.h"
#include "product_check.h"

namespace {

using namespace simt_test;

template <class T, class TA>
class FewRowsCheck {
 public:
  explicit FewRowsCheck(Sizes size)
      : size_(size),
        x_(size.M, size.K, 1),
        weight_(size.N, size.K, 2),
        A_(size.r, size.K, 3),
        B_(size.N, size.r, 4),
        bias_(1, size.N, 5),
        y_(static_cast<size_t>(size.M * size.N + 2 * kMargin)),
        h_(static_cast<size_t>(size.M * size.r + 2 * kMargin)) {
    const auto sum = [](int64_t count, const auto& term) {
      Expected sum{};
      for (int64_t i = 0; i < count; ++i) {
        sum.value += term(i), sum.size_of_terms += std::fabs(term(i));
      }
      return sum;
    };
    for (int64_t m = 0; m < size.M; ++m) {
      for (int64_t j = 0; j < size.r; ++j) {
        want_h_.push_back(sum(size.K, [&](int64_t k) { return x_.at(m, k) * A_.at(j, k); }));
      }
      for (int64_t n = 0; n < size.N; ++n) {
        Expected base = sum(size.K, [&](int64_t k) { return x_.at(m, k) * weight_.at(n, k); });
        const Expected low_rank = sum(size.r, [&](int64_t j) {
          return kScaling * want_h_[m * size.r + j].value * B_.at(n, j);
        });
        const Expected of_terms = sum(size.r, [&](int64_t j) {
          return kScaling * want_h_[m * size.r + j].size_of_terms * B_.at(n, j);
        });
        base.value += low_rank.value + bias_.at(0, n);
        base.size_of_terms += std::fabs(bias_.at(0, n));
        base.size_of_low_rank = of_terms.size_of_terms;
        want_y_.push_back(base);
      }
    }
  }

  void run(KernelFamily family) {
    std::fill(y_.begin(), y_.end(), kNanBits);
    std::fill(h_.begin(), h_.end(), kNan);
    const ForwardCall<T, TA> call{.x = x_.matrix(),
                                  .weight = {weight_.matrix()},
                                  .bias = bias_.matrix().data,
                                  .lora_A = A_.matrix().data,
                                  .lora_B = B_.matrix().data,
                                  .r = static_cast<int>(size_.r),
                                  .scaling = kScaling,
                                  .scaling_factor = nullptr,
                                  .dropout = {},
                                  .y = y_.data() + kMargin,
                                  .h = h_.data() + kMargin};
    EXPECT(sm80::takes_few_rows(call, family));
    sm80::launch_few_rows(call, nullptr, family);
    EXPECT(simt::statistics().ldmatrix_conflicts == 0);
    // The weight once; x and lora_A once for each cluster.
    const simt::RecordedLaunch& recorded = simt::recorded().back();
    const auto clusters = static_cast<int64_t>(recorded.grid.x / recorded.cluster.x);
    const int64_t of_A = size_.r * static_cast<int64_t>(sizeof(TA));
    const int64_t bytes = size_.K * (clusters * (2 * size_.M + of_A) + 2 * size_.N);
    EXPECT(simt::statistics().copied_bytes == bytes);
  }

  // y is rounded once. h's parts and a float adapter are two 16-bit numbers: what that leaves.
  void check(double unit) const {
    for (size_t i = 0; i < want_h_.size(); ++i) {
      const double bound = (kRest * unit * unit + 0x1p-22) * want_h_[i].size_of_terms;
      EXPECT(std::fabs(h_[kMargin + i] - want_h_[i].value) <= bound);
    }
    for (size_t i = 0; i < want_y_.size(); ++i) {
      const Expected& want = want_y_[i];
      const double bound = unit * std::fabs(want.value) + 0x1p-22 * want.size_of_terms +
                           4 * unit * unit * want.size_of_low_rank;
      EXPECT(std::fabs(to_float(y_[kMargin + i]) - want.value) <= bound);
    }
    for (int64_t i = 0; i < kMargin; ++i) {
      EXPECT(y_[i].bits == kNanBits.bits && y_[y_.size() - 1 - i].bits == kNanBits.bits);
      EXPECT(h_[i] != h_[i] && h_[h_.size() - 1 - i] != h_[h_.size() - 1 - i]);
    }
  }

  std::vector<T> y() const { return {y_.begin() + kMargin, y_.end() - kMargin}; }

 private:
  struct Expected {
    double value, size_of_terms, size_of_low_rank;
  };

  static constexpr T kNanBits{0x7FFF};  // NaN in both types
  static constexpr float kScaling = 0.5f;
  static constexpr int kRest = sizeof(TA) == sizeof(float) ? 1 : 0;

  Sizes size_;
  Values<T> x_, weight_;
  Values<TA> A_, B_;
  Values<float> bias_;
  std::vector<T> y_;
  std::vector<float> h_;
  std::vector<Expected> want_h_, want_y_;
};

template <class T, class TA>
void check_few_rows(Sizes size, KernelFamily family, double unit) {
  FewRowsCheck<T, TA> problem(size);
  for_each_schedule([&] {
    if (family == KernelFamily::Sm80) simt::options().compute_capability = 86;
    problem.run(family);
    problem.check(unit);
  });
  const std::vector<T> few = problem.y();
  simt::options().multiprocessors = 132;
  problem.run(family);
  const std::vector<T> many = problem.y();
  EXPECT(std::memcmp(few.data(), many.data(), few.size() * sizeof(T)) == 0);
}

// Tails of all sizes; several rings of steps for each block.
constexpr Sizes kFew = {9, 40, 520, 8}, kMore = {33, 136, 264, 20}, kMost = {64, 72, 72, 11};
constexpr Sizes kLarge = {17, 72, 1096, 33}, kTiny = {1, 1, 8, 1};

CASE(by_themselves) {
  check_few_rows<Bf16, Bf16>(kFew, KernelFamily::Sm80, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kMore, KernelFamily::Sm80, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kMost, KernelFamily::Sm80, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kTiny, KernelFamily::Sm80, kBf16Unit);
}

CASE(in_clusters) {
  check_few_rows<Bf16, Bf16>(kFew, KernelFamily::Sm90, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kLarge, KernelFamily::Sm90, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kMore, KernelFamily::Sm90, kBf16Unit);
  check_few_rows<Bf16, Bf16>(kTiny, KernelFamily::Sm90, kBf16Unit);
}

CASE(float_adapters) {
  check_few_rows<Bf16, float>(kFew, KernelFamily::Sm80, kBf16Unit);
  check_few_rows<Bf16, float>(kMore, KernelFamily::Sm90, kBf16Unit);
}

#if !defined(BF16_ONLY)
CASE(fp16) {
  check_few_rows<Fp16, Fp16>(kFew, KernelFamily::Sm80, kFp16Unit);
  check_few_rows<Fp16, float>(kMore, KernelFamily::Sm90, kFp16Unit);
}
#endif

}  // namespace
