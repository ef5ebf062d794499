// The low-rank passes of sm_90a (csrc/kernels/low_rank_sm90.h): their sums, which are exact because
// all values are small integers; what they read and multiply; and the choices of
// launch_low_rank_sm90.h.

#include <cmath>
#include <memory>

#include "check.h"
#include "common/dropout.h"
#include "kernels/launch_low_rank_sm90.h"

namespace lora_ext::sm80 {

// In this program every pass is one for sm_90a.
template <class T>
Parts down(const Matrix<T>&, const Split<T>&, const Dropout&, const Allocator&, Stream) {
  throw simt_test::Failure("down was left to the kernels for sm_80");
}
template <class T>
UpGradParts up_grad(const UpGrad<T>&, const Allocator&, Stream) {
  throw simt_test::Failure("up_grad was left to the kernels for sm_80");
}
template <class T>
Parts down_grad(const Matrix<T>&, const Split<T>&, const Dropout&, const Allocator&, Stream) {
  throw simt_test::Failure("down_grad was left to the kernels for sm_80");
}

}  // namespace lora_ext::sm80

namespace {

using namespace lora_ext;
using namespace simt_test;

constexpr uint32_t kThreshold = 45000;
constexpr int64_t kRngState[2] = {12345678901, 44};
constexpr DropoutRng kRng{12345678901, 44};
constexpr Dropout kNoDropout{false, 0, 1.0f, nullptr};
constexpr Dropout kDropout{true, kThreshold, 1.0f, kRngState};

// Small integers, rows at multiples of 16 bytes, and NaN wherever no kernel may read.
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

struct Sizes {
  int64_t M, C, r;
  bool remainders;
  int multiprocessors;
};

// Every part is complete: their sum has no NaN.
double sum_of(const Parts& parts, int64_t elements, int64_t i) {
  double sum = 0;
  for (int part = 0; part < parts.count; ++part) sum += parts.data[part * elements + i];
  return sum;
}

// What TMA brings and the tensor cores do: each tile of X once for each 64 of the rank.
void check_counts(const Sizes& size, int L_terms, int R_terms, int64_t column_blocks) {
  const auto tiles = [](int64_t length) { return (length + 127) / 128; };
  int64_t bytes = 0, wgmma = 0;
  for (int64_t first = 0; first < size.r; first += 64) {
    const int64_t left = size.r - first, width = left <= 16 ? 16 : (left <= 32 ? 32 : 64);
    bytes += tiles(size.M) *
             (tiles(size.C) * (128 * 128 + L_terms * 128 * width) +
              column_blocks * R_terms * 128 * width) *
             2;
    wgmma += tiles(size.M) * tiles(size.C) * 2 * 8 * (L_terms + R_terms);
  }
  int64_t seen_bytes = 0, seen_wgmma = 0;
  for (const simt::Statistics& launch : simt::launches()) {
    seen_bytes += launch.tma_bytes, seen_wgmma += launch.wgmma;
  }
  EXPECT(seen_bytes == bytes);
  EXPECT(seen_wgmma == wgmma);
}

bool kept(const Dropout& dropout, int64_t row, int64_t column) {
  return !dropout.enabled || dropout_keep(kRng, row, column, kThreshold);
}

void begin(const Sizes& size) {
  simt::options().multiprocessors = size.multiprocessors;
  simt::launches().clear();
}

template <class T>
void check_down(const Sizes& size, const Dropout& dropout) {
  const Integers<T> x(size.M, size.C, 1);
  const Operand<T> A(size.r, size.C, size.remainders, 2);
  Scratch scratch;
  begin(size);
  const Parts h = sm90::down(x.matrix(), A.split(), dropout, scratch.allocator(), nullptr);
  check_counts(size, size.remainders ? 2 : 1, 0, h.count);
  for (int64_t m = 0; m < size.M; ++m) {
    for (int64_t j = 0; j < size.r; ++j) {
      double expected = 0;
      for (int64_t k = 0; k < size.C; ++k) {
        if (kept(dropout, m, k)) expected += x.at(m, k) * A.at(j, k);
      }
      EXPECT(sum_of(h, size.M * size.r, m * size.r + j) == expected);
    }
  }
  scratch.check_margins();
}

template <class T>
void check_up_grad(const Sizes& size, bool wants_dh = true, bool wants_dB = true) {
  const Integers<T> dy(size.M, size.C, 1);
  const Operand<T> B(size.C, size.r, size.remainders, 2), h(size.M, size.r, true, 4);
  Scratch scratch;
  begin(size);
  const auto [dh, dB] =
      sm90::up_grad<T>({dy.matrix(), B.split(), wants_dB ? h.split() : Split<T>{}, wants_dh},
                       scratch.allocator(), nullptr);
  check_counts(size, wants_dh ? (size.remainders ? 2 : 1) : 0, wants_dB ? 2 : 0, dh.count);
  EXPECT((dh.data != nullptr) == wants_dh && (dB.data != nullptr) == wants_dB);
  for (int64_t m = 0; wants_dh && m < size.M; ++m) {
    for (int64_t j = 0; j < size.r; ++j) {
      double expected = 0;
      for (int64_t n = 0; n < size.C; ++n) expected += dy.at(m, n) * B.at(n, j);
      EXPECT(sum_of(dh, size.M * size.r, m * size.r + j) == expected);
    }
  }
  for (int64_t n = 0; wants_dB && n < size.C; ++n) {
    for (int64_t j = 0; j < size.r; ++j) {
      double expected = 0;
      for (int64_t m = 0; m < size.M; ++m) expected += dy.at(m, n) * h.at(m, j);
      EXPECT(sum_of(dB, size.C * size.r, n * size.r + j) == expected);
    }
  }
  scratch.check_margins();
}

template <class T>
void check_down_grad(const Sizes& size, const Dropout& dropout) {
  const Integers<T> x(size.M, size.C, 1);
  const Operand<T> dh(size.M, size.r, true, 2);
  Scratch scratch;
  begin(size);
  const Parts dA = sm90::down_grad(x.matrix(), dh.split(), dropout, scratch.allocator(), nullptr);
  const int64_t launches = static_cast<int64_t>(simt::launches().size());
  EXPECT(launches == (size.r + 63) / 64);
  for (int64_t j = 0; j < size.r; ++j) {
    for (int64_t k = 0; k < size.C; ++k) {
      double expected = 0;
      for (int64_t m = 0; m < size.M; ++m) {
        if (kept(dropout, m, k)) expected += x.at(m, k) * dh.at(m, j);
      }
      EXPECT(sum_of(dA, size.C * size.r, j * size.C + k) == expected);
    }
  }
  scratch.check_margins();
}

// One block that walks several rows and columns of tiles, so that its ring turns; and several.
constexpr Sizes kOneBlock = {290, 456, 11, true, 1};
constexpr Sizes kSeveralBlocks = {200, 264, 24, false, 5};

CASE(bf16_down) {
  for_each_schedule([] {
    check_down<Bf16>(kOneBlock, kDropout);
    check_down<Bf16>(kSeveralBlocks, kNoDropout);
  });
}

CASE(bf16_up_grad) {
  for_each_schedule([] {
    check_up_grad<Bf16>(kOneBlock);
    check_up_grad<Bf16>(kSeveralBlocks);
  });
}

CASE(bf16_down_grad) {
  for_each_schedule([] {
    check_down_grad<Bf16>(kOneBlock, kDropout);
    check_down_grad<Bf16>(kSeveralBlocks, kNoDropout);
  });
}

#if !defined(BF16_ONLY)
CASE(fp16_and_other_ranks) {
  int turn = 0;
  for_each_schedule([&] {
    const auto size = std::vector<Sizes>{{1, 72, 1, false, 3},
                                         {130, 130, 64, true, 132},
                                         {65, 300, 80, false, 2},
                                         {257, 129, 33, true, 1}}[turn++ % 4];
    check_down<Fp16>(size, kDropout);
    check_up_grad<Fp16>(size);
    check_down_grad<Fp16>(size, kDropout);
  });
}

CASE(only_what_is_wanted) {
  check_up_grad<Bf16>(kSeveralBlocks, true, false);
  check_up_grad<Bf16>(kSeveralBlocks, false, true);
}
#endif

}  // namespace
