// Matrices of the tests of the low-rank passes of sm_90a, and where their results go.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"
#include "kernels/launch_low_rank_sm90.h"

namespace simt_test {

using namespace lora_ext;

// Whole numbers, or rounded normal ones, rows at multiples of 16 bytes, and NaN wherever no kernel
// may read.
template <class T>
struct Integers {
  static constexpr int64_t kMargin = 16384;

  Integers(int64_t rows, int64_t columns, unsigned seed)
      : rows(rows), columns(columns), stride((columns + 7) / 8 * 8) {
    data.assign(static_cast<size_t>(rows * stride + 2 * kMargin), rounded<T>(kNan));
    const auto values = small_integers<T>(static_cast<size_t>(rows * columns), seed);
    for (int64_t i = 0; i < rows * columns; ++i) {
      data[kMargin + i / columns * stride + i % columns] = values[i];
    }
  }
  Matrix<T> matrix() const { return {data.data() + kMargin, rows, columns, stride}; }
  double at(int64_t row, int64_t column) const {
    return to_float(data[kMargin + row * stride + column]);
  }

  int64_t rows, columns, stride;
  std::vector<T> data;
};

// An operand as a Split: of a float adapter with a remainder.
template <class T>
struct Operand {
  Operand(int64_t rows, int64_t columns, bool remainder, unsigned seed)
      : value(rows, columns, seed), rest(rows, columns, seed + 1), two(remainder) {}
  Split<T> split() const { return {value.matrix(), two ? rest.matrix().data : nullptr}; }
  double at(int64_t row, int64_t column) const {
    return value.at(row, column) + (two ? rest.at(row, column) : 0.0);
  }

  Integers<T> value, rest;
  bool two;
};

// NaN until a kernel writes, also beside what it may write.
class Scratch {
 public:
  Allocator allocator() { return {allocate, this}; }
  void check_margins() const {
    for (const std::vector<float>& block : blocks_) {
      for (size_t i = 0; i < kMargin; ++i) {
        EXPECT(std::isnan(block[i]) && std::isnan(block[block.size() - 1 - i]));
      }
    }
  }

 private:
  static constexpr size_t kMargin = 4096;

  static void* allocate(void* context, int64_t bytes) {
    auto& blocks = static_cast<Scratch*>(context)->blocks_;
    blocks.emplace_back(static_cast<size_t>(bytes) / 4 + 2 * kMargin, kNan);
    return blocks.back().data() + kMargin;
  }
  std::vector<std::vector<float>> blocks_;
};

// [rows, columns] sums of term(row, column, k): the same in every schedule, and computed once.
template <class Term>
std::vector<double> sums(int64_t rows, int64_t columns, int64_t depth, const Term& term) {
  std::vector<double> result(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows * columns; ++i) {
    for (int64_t k = 0; k < depth; ++k) result[i] += term(i / columns, i % columns, k);
  }
  return result;
}

// Where h or dh goes: NaN until it is written, with two copies of the operand.
template <class T>
struct HiddenResult {
  static constexpr int kCopies = 2, kBelow = 128;  // rows that nobody may write

  HiddenResult(int64_t M, int64_t r)
      : M(M),
        r(r),
        padded((r + 15) / 16 * 16),
        sums(static_cast<size_t>((M + kBelow) * r), kNan),
        value(static_cast<size_t>((M + kBelow) * kCopies * padded), rounded<T>(kNan)),
        remainder(value) {}
  Hidden<T> hidden(float survivor = 1.0f, float scaling = 1.0f) {
    return {M,
            static_cast<int>(r),
            static_cast<int>(padded),
            kCopies,
            kCopies * padded,
            survivor,
            {scaling, nullptr},
            sums.data(),
            value.data(),
            remainder.data()};
  }
  void check(const std::vector<double>& expected) const {
    for (int64_t i = 0; i < M * padded * kCopies; ++i) {
      const int64_t row = i / (padded * kCopies), column = i % padded;
      const auto at = static_cast<size_t>(row * r + column);
      const float sum = column < r ? sums[at] : 0.0f;
      if (column < r) EXPECT(sum == expected[at]);
      const float near = to_float(value[static_cast<size_t>(i)]);
      EXPECT(near == to_float(rounded<T>(sum)));
      EXPECT(to_float(remainder[static_cast<size_t>(i)]) == to_float(rounded<T>(sum - near)));
    }
    for (int64_t i = M * r; i < (M + kBelow) * r; ++i) EXPECT(std::isnan(sums[size_t(i)]));
    for (int64_t i = M * padded * kCopies; i < (M + kBelow) * padded * kCopies; ++i) {
      EXPECT(std::isnan(to_float(value[size_t(i)])) && std::isnan(to_float(remainder[size_t(i)])));
    }
  }

  int64_t M, r, padded;
  std::vector<float> sums;
  std::vector<T> value, remainder;
};

// Where dB or dA goes: in float, or as what the base is.
template <class T>
struct GradientResult {
  explicit GradientResult(int64_t count)
      : full(static_cast<size_t>(count), kNan),
        near(static_cast<size_t>(count), rounded<T>(kNan)) {}
  Gradient<T> gradient(bool wants_full, float scale = 1.0f) {
    return {
        {scale, nullptr}, wants_full ? nullptr : near.data(), wants_full ? full.data() : nullptr};
  }
  void check(const std::vector<double>& expected, bool wants_full) const {
    for (size_t i = 0; i < expected.size(); ++i) {
      const auto sum = static_cast<float>(expected[i]);
      EXPECT(wants_full ? full[i] == sum : to_float(near[i]) == to_float(rounded<T>(sum)));
    }
  }

  std::vector<float> full;
  std::vector<T> near;
};

}  // namespace simt_test
