// The low-rank passes of sm_90a (csrc/kernels/low_rank_sm90.h): their sums, which are exact because
// all values are small integers; what they read and multiply; and the choices of
// launch_low_rank_sm90.h.

#include <cmath>
#include <memory>

#include "check.h"
#include "common/dropout.h"
#include "kept_bits.h"
#include "kernels/launch_low_rank_sm90.h"

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

bool kept(const Dropout& dropout, int64_t row, int64_t column) {
  return !dropout.enabled || dropout_keep(kRng, row, column, dropout.threshold);
}

// [rows, columns] sums of term(row, column, k): the same in every schedule, and computed once.
template <class Term>
std::vector<double> sums(int64_t rows, int64_t columns, int64_t depth, const Term& term) {
  std::vector<double> result(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows * columns; ++i) {
    for (int64_t k = 0; k < depth; ++k) result[i] += term(i / columns, i % columns, k);
  }
  return result;
}

// Every part is complete: their sum has no NaN.
void check_sum(const Parts& parts, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    double sum = 0;
    for (int part = 0; part < parts.count; ++part) sum += parts.data[part * expected.size() + i];
    EXPECT(sum == expected[i]);
  }
}

// What TMA brings and the tensor cores do: each tile of X once for each group of up to 128 ranks,
// of more than 64 once for P and once for Q.
void check_counts(const Sizes& size, int L_terms, int R_terms) {
  const auto tiles = [](int64_t length) { return (length + 127) / 128; };
  std::vector<std::pair<int, int>> passes = {{L_terms, R_terms}};
  if (size.r > 64 && L_terms > 0 && R_terms > 0) passes = {{L_terms, 0}, {0, R_terms}};
  const auto& launches = simt::launches();
  size_t launch = 0;
  for (const auto& [of_P, of_Q] : passes) {
    for (int64_t first = 0; first < size.r; first += 128, ++launch) {
      int64_t width = 16;
      while (width < size.r - first && width < 128) width *= 2;
      EXPECT(launch < launches.size());
      const int64_t column_blocks = simt::recorded()[launch].grid.x;
      EXPECT(launches[launch].tma_bytes == tiles(size.M) *
                                               (tiles(size.C) * (128 * 128 + of_P * 128 * width) +
                                                column_blocks * of_Q * 128 * width) *
                                               2);
      EXPECT(launches[launch].wgmma == tiles(size.M) * tiles(size.C) * 2 * 8 * (of_P + of_Q));
    }
  }
  EXPECT(launch == launches.size());
}

void begin(const Sizes& size) {
  simt::options().multiprocessors = size.multiprocessors;
  simt::launches().clear();
  simt::recorded().clear();
}

template <class T>
struct DownCheck {
  DownCheck(const Sizes& size, const Dropout& dropout)
      : size(size),
        dropout(dropout),
        x(size.M, size.C, 1),
        A(size.r, size.C, size.remainders, 2),
        expected(sums(size.M, size.r, size.C, [&](int64_t m, int64_t j, int64_t k) {
          return kept(dropout, m, k) ? x.at(m, k) * A.at(j, k) : 0.0;
        })) {}

  void check() const {
    Scratch scratch;
    begin(size);
    const Parts h = sm90::launch_down(x.matrix(), A.split(), dropout, scratch.allocator(), nullptr);
    check_counts(size, size.remainders ? 2 : 1, 0);
    check_sum(h, expected);
    scratch.check_margins();
  }

  Sizes size;
  Dropout dropout;
  Integers<T> x;
  Operand<T> A;
  std::vector<double> expected;
};

template <class T>
struct UpGradCheck {
  explicit UpGradCheck(const Sizes& size)
      : size(size),
        dy(size.M, size.C, 1),
        B(size.C, size.r, size.remainders, 2),
        h(size.M, size.r, true, 4),
        expected_dh(
            sums(size.M, size.r, size.C,
                 [&](int64_t m, int64_t j, int64_t n) { return dy.at(m, n) * B.at(n, j); })),
        expected_dB(sums(size.C, size.r, size.M, [&](int64_t n, int64_t j, int64_t m) {
          return dy.at(m, n) * h.at(m, j);
        })) {}

  void check(bool wants_dh = true, bool wants_dB = true) const {
    Scratch scratch;
    begin(size);
    const auto [dh, dB] = sm90::launch_up_grad<T>(
        {dy.matrix(), B.split(), wants_dB ? h.split() : Split<T>{}, wants_dh}, scratch.allocator(),
        nullptr);
    check_counts(size, wants_dh ? (size.remainders ? 2 : 1) : 0, wants_dB ? 2 : 0);
    EXPECT((dh.data != nullptr) == wants_dh && (dB.data != nullptr) == wants_dB);
    if (wants_dh) check_sum(dh, expected_dh);
    if (wants_dB) check_sum(dB, expected_dB);
    scratch.check_margins();
  }

  Sizes size;
  Integers<T> dy;
  Operand<T> B, h;
  std::vector<double> expected_dh, expected_dB;
};

template <class T>
struct DownGradCheck {
  DownGradCheck(const Sizes& size, const Dropout& dropout)
      : size(size),
        dropout(dropout),
        x(size.M, size.C, 1),
        dh(size.M, size.r, true, 2),
        expected(sums(size.r, size.C, size.M, [&](int64_t j, int64_t k, int64_t m) {
          return kept(dropout, m, k) ? x.at(m, k) * dh.at(m, j) : 0.0;
        })) {}

  // Its decisions go to the product where there is dropout, if that is asked for.
  void check(bool leaves_bits = true) const {
    Scratch scratch;
    begin(size);
    KeptBits bits{};
    if (dropout.enabled && leaves_bits) {
      bits = KeptBits::allocate(size.M, size.C, scratch.allocator());
    }
    const Parts dA =
        sm90::launch_down_grad(x.matrix(), dh.split(), dropout, bits, scratch.allocator(), nullptr);
    check_counts(size, 0, 2);
    check_sum(dA, expected);
    for (int64_t i = 0; bits.data && i < size.M * size.C; ++i) {
      const int64_t row = i / size.C, column = i % size.C;
      EXPECT(KeptBit(bits, row, column).get() ==
             dropout_keep(kRng, row, column, dropout.threshold));
    }
    scratch.check_margins();
  }

  Sizes size;
  Dropout dropout;
  Integers<T> x;
  Operand<T> dh;
  std::vector<double> expected;
};

// One block that walks several rows and columns of tiles, so that its ring turns; and several.
constexpr Sizes kOneBlock = {290, 456, 11, true, 1};
constexpr Sizes kSeveralBlocks = {200, 264, 24, false, 5};

CASE(bf16_down) {
  const DownCheck<Bf16> one(kOneBlock, kDropout), several(kSeveralBlocks, kNoDropout);
  for_each_schedule([&] { one.check(), several.check(); });
}

CASE(bf16_up_grad) {
  const UpGradCheck<Bf16> one(kOneBlock), several(kSeveralBlocks);
  for_each_schedule([&] { one.check(), several.check(); });
}

CASE(bf16_down_grad) {
  const DownGradCheck<Bf16> one(kOneBlock, kDropout), several(kSeveralBlocks, kNoDropout);
  for_each_schedule([&] { one.check(), several.check(); });
}

// Everything is dropped, or nothing, or nearly so: a threshold of 17 bits is none.
CASE(bf16_any_threshold) {
  for (const uint32_t threshold : {0u, 1u, 32767u, 32768u, 65535u, 65536u}) {
    const Dropout dropout{true, threshold, 1.0f, kRngState};
    DownCheck<Bf16>({65, 136, 8, false, 1}, dropout).check();
    DownGradCheck<Bf16>({65, 136, 8, false, 1}, dropout).check(dropout.drops());
  }
}

// Two boxes of ranks; dh and dB in passes of their own.
CASE(bf16_ranks_beyond_64) {
  const UpGradCheck<Bf16> up_grad({200, 264, 72, false, 5});
  const DownGradCheck<Bf16> down_grad({130, 136, 72, false, 2}, kDropout);
  for_each_schedule([&] { up_grad.check(), down_grad.check(); });
}

#if !defined(BF16_ONLY)
CASE(fp16_and_other_ranks) {
  constexpr Sizes kOthers[] = {{1, 72, 1, false, 3},
                               {130, 130, 64, true, 132},
                               {65, 300, 136, false, 2},
                               {257, 129, 90, true, 1}};
  for (const Sizes& size : kOthers) {
    const DownCheck<Fp16> down(size, kDropout);
    const UpGradCheck<Fp16> up_grad(size);
    const DownGradCheck<Fp16> down_grad(size, kDropout);
    int schedule = 0;
    for_each_schedule([&] {
      if (schedule++ % 4 == &size - kOthers) down.check(), up_grad.check(), down_grad.check();
    });
  }
}

// Every thread fences what it stored itself.
CASE(dropout_is_seen_by_wgmma) {
  simt::options().watch_stores = true;
  DownCheck<Bf16>({130, 136, 8, false, 1}, kDropout).check();
  DownGradCheck<Bf16>({130, 136, 8, false, 1}, kDropout).check();
}

// ---- Choices -----------------------------------------------------------------------------------

// Tiles of 128 x 128.
sm90::LowRankSize size_of(int64_t row_tiles, int64_t column_tiles, bool P, bool Q, int rank = 64) {
  const int64_t sums = 128 * rank * 4, operand = 128 * rank * 2;
  return {row_tiles,
          column_tiles,
          32768 + (P ? operand : 0),
          (P ? 2 * sums : 0) + (Q ? 2 * operand : 0),
          Q ? 2 * sums : 0,
          Q ? sm90::most_column_tiles(rank) : 0};
}

CASE(blocks_cover_every_tile_once_and_use_the_multiprocessors) {
  for (const auto& [P, Q] : {std::pair{true, false}, {true, true}, {false, true}}) {
    for (const int64_t rows : {1, 3, 32, 100, 133, 1000}) {
      for (const int64_t columns : {1, 3, 32, 86, 1000}) {
        const auto cut = sm90::choose_cut(size_of(rows, columns, P, Q), 132);
        const auto covers = [](int64_t tiles, int64_t each, int64_t blocks) {
          return blocks * each >= tiles && (blocks - 1) * each < tiles;
        };
        EXPECT(covers(rows, cut.row_tiles, cut.row_blocks));
        EXPECT(covers(columns, cut.column_tiles, cut.column_blocks));
        EXPECT(!Q || cut.column_tiles <= 4);
        // No block has twice its share of tiles, but for the rounding of rows and columns.
        const int64_t blocks = cut.row_blocks * cut.column_blocks, turns = (blocks + 131) / 132;
        EXPECT(turns * (cut.row_tiles - 1) * (cut.column_tiles - 1) * 132 < 2 * rows * columns);
      }
    }
  }
}

CASE(parts_are_few) {
  const auto cut = [](bool P, bool Q) { return sm90::choose_cut(size_of(32, 32, P, Q), 132); };
  EXPECT(cut(true, false).column_blocks == 4);  // parts of h, each read and written once
  EXPECT(cut(false, true).row_blocks == 8);     // of dA
  EXPECT(cut(true, true).column_blocks == 8 && cut(true, true).row_blocks == 16);
  // Of 128 ranks: dh and dB by themselves
  EXPECT(sm90::choose_cut(size_of(32, 32, true, false, 128), 132).column_blocks == 4);
  EXPECT(sm90::choose_cut(size_of(32, 32, false, true, 128), 132).row_blocks == 8);
}

CASE(a_ring_holds_what_fits) {
  using Shape = sm90::LowRankShape<64, true, true, sm90::Major::kMN>;
  const auto [stages, stage_bytes, R_tiles, R_bytes, barriers, bytes] =
      sm90::layout_for<Shape>(1, 2, 1000);
  EXPECT(stages == 3 && stage_bytes == 3 * 16384 && R_bytes == 2 * 16384);
  EXPECT(R_tiles == stages * stage_bytes && barriers == R_tiles + 2 * R_bytes);
  EXPECT(bytes <= 227 * 1024 && bytes + stage_bytes > 227 * 1024);
  EXPECT(sm90::layout_for<Shape>(1, 2, 2).stages == 2);
}

CASE(only_what_is_wanted) {
  const UpGradCheck<Bf16> up_grad(kSeveralBlocks);
  up_grad.check(true, false);
  up_grad.check(false, true);
}
#endif

}  // namespace
