// The product of several segments (csrc/kernels/lora_linear_passes.h) with random matrices, and its
// result against float64. The programs of both families share it.
#pragma once

#include "check.h"
#include "kept_bits.h"
#include "kernels/lora_linear_passes.h"

namespace simt_test {

using namespace lora_ext;

constexpr int64_t kMargin = 16384;  // elements, more than a tile

// A row-major matrix of normal values between NaN, so that reading beside it shows.
template <class T>
struct Values {
  Values(int64_t rows, int64_t columns, unsigned seed) : rows(rows), columns(columns) {
    const std::vector<T> margin(kMargin, rounded<T>(kNan));
    data = normal_values<T>(rows * columns, seed);
    data.insert(data.begin(), margin.begin(), margin.end());
    data.insert(data.end(), margin.begin(), margin.end());
  }
  Matrix<T> matrix() const { return {data.data() + kMargin, rows, columns, columns}; }
  double at(int64_t row, int64_t column) const {
    return to_float(data[kMargin + row * columns + column]);
  }

  int64_t rows, columns;
  std::vector<T> data;
};

struct Sizes {
  int64_t M, N, K, r;
  bool aligned = true;
};

// As in forward: the base, then the low-rank part, and a bias. As in backward: the low-rank part,
// dropout's mask, then the base. Its result is the same in every schedule, and computed once.
template <class T, BLayout kLayout>
class ProductCheck {
 public:
  explicit ProductCheck(Sizes size)
      : size_(size),
        a_{{size.M, depth(0), 1}, {size.M, depth(1), 2}},
        b_{operand_b(depth(0), 3), operand_b(depth(1), 4)},
        bias_(1, size.N, 5),
        out_(static_cast<size_t>(size.M * size.N + 2 * kMargin)) {
    for (int64_t m = 0; m < size.M; ++m) {
      for (int64_t n = 0; n < size.N; ++n) expected_.push_back(expect(m, n));
    }
  }

  // Into an output of NaN; with dropout's decisions to be read, or drawn. Beside those of the
  // matrix there are others.
  Product<T> product(bool reads_bits = false) {
    std::fill(out_.begin(), out_.end(), kNanBits);
    Product<T> product{};
    product.count = 2;
    product.aligned = size_.aligned;
    if (kColumns) {
      product.bias = bias_.matrix().data;
    } else {
      product.masked = 1, product.dropout = {true, kThreshold, 1.0f, kRngState};
      if (reads_bits) product.kept = make_bits();
    }
    product.out = out_.data() + kMargin;
    product.M = size_.M, product.N = size_.N;
    for (int s = 0; s < 2; ++s) product.segments[s] = {a_[s].matrix(), b_[s].matrix()};
    return product;
  }

  // One rounding of the result to a multiple of `unit`, and those of the sums in float.
  void check(double unit) const {
    for (size_t i = 0; i < expected_.size(); ++i) {
      const auto [expected, size_of_terms] = expected_[i];
      const double bound = unit * std::fabs(expected) + 0x1p-22 * size_of_terms;
      EXPECT(std::fabs(to_float(out_[kMargin + i]) - expected) <= bound);
    }
    for (int64_t i = 0; i < kMargin; ++i) {
      EXPECT(out_[i].bits == kNanBits.bits && out_[out_.size() - 1 - i].bits == kNanBits.bits);
    }
  }

 private:
  KeptBits make_bits() {
    const auto allocate = [](void* self, int64_t bytes) -> void* {
      auto& words = static_cast<ProductCheck*>(self)->bits_;
      words.assign(static_cast<size_t>(bytes / 4), 0x5A5A5A5Au);
      return words.data();
    };
    const KeptBits bits = KeptBits::allocate(size_.M, size_.N, {allocate, this});
    for (int64_t i = 0; i < size_.M * size_.N; ++i) {
      const int64_t m = i / size_.N, n = i % size_.N;
      KeptBit(bits, m, n).set(dropout_keep(kRng, m, n, kThreshold));
    }
    return bits;
  }

  struct Expected {
    double value, size_of_terms;
  };

  static constexpr bool kColumns = kLayout == BLayout::kColumns;
  static constexpr T kNanBits{0x7FFF};  // NaN in both types
  static constexpr uint32_t kThreshold = 45000;
  static constexpr int64_t kRngState[2] = {12345678901, 44};
  static constexpr DropoutRng kRng{12345678901, 44};

  int64_t depth(int segment) const { return (segment == 0) == kColumns ? size_.K : size_.r; }
  Values<T> operand_b(int64_t depth, unsigned seed) const {
    return kColumns ? Values<T>(size_.N, depth, seed) : Values<T>(depth, size_.N, seed);
  }

  Expected expect(int64_t m, int64_t n) const {
    Expected sum{};
    const auto add = [&](double term) { sum.value += term, sum.size_of_terms += std::fabs(term); };
    if (kColumns) add(bias_.at(0, n));
    for (int s = 0; s < 2; ++s) {
      if (!kColumns && s == 0 && !dropout_keep(kRng, m, n, kThreshold)) continue;
      for (int64_t k = 0; k < depth(s); ++k) {
        add(a_[s].at(m, k) * (kColumns ? b_[s].at(n, k) : b_[s].at(k, n)));
      }
    }
    return sum;
  }

  Sizes size_;
  Values<T> a_[2], b_[2];
  Values<float> bias_;
  std::vector<T> out_;
  std::vector<uint32_t> bits_;
  std::vector<Expected> expected_;
};

constexpr double kBf16Unit = 0x1p-8, kFp16Unit = 0x1p-11;

}  // namespace simt_test
