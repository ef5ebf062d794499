// The low-rank passes of sm_90a (csrc/kernels/low_rank_sm90.h): their sums, which are exact because
// all values are small integers; what they read and multiply; and the choices of
// launch_low_rank_sm90.h.

#include "common/dropout.h"
#include "kept_bits.h"
#include "low_rank_problem.h"

namespace {

using namespace lora_ext;
using namespace simt_test;

constexpr uint32_t kThreshold = 45000;
constexpr int64_t kRngState[2] = {12345678901, 44};
constexpr DropoutRng kRng{12345678901, 44};
constexpr Dropout kNoDropout{false, 0, 1.0f, nullptr};
constexpr Dropout kDropout{true, kThreshold, 1.0f, kRngState};

struct Sizes {
  int64_t M, C, r;
  bool remainders;
  int multiprocessors;
};

bool kept(const Dropout& dropout, int64_t row, int64_t column) {
  return !dropout.enabled || dropout_keep(kRng, row, column, dropout.threshold);
}

// What TMA brings and the tensor cores do: each tile of X once for each group of up to 128 ranks,
// of more than 64 once for P and once for Q.
void check_counts(const Sizes& size, int L_terms, int R_terms) {
  const auto tiles = [](int64_t length) { return (length + 127) / 128; };
  std::vector<std::pair<int, int>> passes = {{L_terms, R_terms}};
  if (size.r > 64 && L_terms > 0 && R_terms > 0) passes = {{L_terms, 0}, {0, R_terms}};
  const auto& launches = simt::launches();
  size_t launch = 0;
  const auto skip_sums = [&] {  // the kernels that add what is left
    while (launch < launches.size() && launches[launch].wgmma == 0) ++launch;
  };
  for (const auto& [of_P, of_Q] : passes) {
    for (int64_t first = 0; first < size.r; first += 128, ++launch) {
      int64_t width = 16;
      while (width < size.r - first && width < 128) width *= 2;
      skip_sums();
      EXPECT(launch < launches.size());
      const auto cut = sm90::choose_cut(sm90::low_rank_size(size.M, size.C, size.r, of_P, of_Q),
                                        sm90::blocks_at_once(size.multiprocessors));
      const int64_t column_blocks = cut.column_blocks;
      EXPECT(launches[launch].tma_bytes == tiles(size.M) *
                                               (tiles(size.C) * (128 * 128 + of_P * 128 * width) +
                                                column_blocks * of_Q * 128 * width) *
                                               2);
      EXPECT(launches[launch].wgmma == tiles(size.M) * tiles(size.C) * 2 * 8 * (of_P + of_Q));
    }
  }
  skip_sums();
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
    HiddenResult<T> h(size.M, size.r);
    sm90::launch_down(x.matrix(), A.split(), dropout, h.hidden(), scratch.allocator(), nullptr);
    check_counts(size, size.remainders ? 2 : 1, 0);
    h.check(expected);
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
    HiddenResult<T> dh(size.M, size.r);
    GradientResult<T> dB(size.C * size.r);
    Gradients<T> left;
    sm90::launch_up_grad<T>({dy.matrix(), B.split(), wants_dB ? h.split() : Split<T>{}, wants_dh,
                             dh.hidden(), dB.gradient(size.remainders)},
                            left, scratch.allocator(), nullptr);
    left.launch(nullptr);
    check_counts(size, wants_dh ? (size.remainders ? 2 : 1) : 0, wants_dB ? 2 : 0);
    if (wants_dh) dh.check(expected_dh);
    if (wants_dB) dB.check(expected_dB, size.remainders);
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
    GradientResult<T> dA(size.r * size.C);
    Gradients<T> left;
    sm90::launch_down_grad(x.matrix(), dh.split(), dropout, bits, dA.gradient(size.remainders),
                           left, scratch.allocator(), nullptr);
    left.launch(nullptr);
    check_counts(size, 0, 2);
    dA.check(expected, size.remainders);
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

// ---- Clusters ----------------------------------------------------------------------------------

// A pass that is cut as a test wants it.
struct ClusterCase {
  int64_t M, C, r;
  bool P, Q;  // what it makes
  int64_t row_tiles, column_tiles;
  int cluster;
  bool along_rows, adds_P, adds_Q;
};

// Of values whose sums depend on their order; one is infinite, so that nothing beyond the rank is
// zero by itself.
class ClusterPass {
 public:
  explicit ClusterPass(const ClusterCase& of)
      : of_(of),
        x_(normal(of.M, of.C, 1)),
        L_(of.Q ? normal(of.C, of.r, 2) : normal(of.r, of.C, 2)),
        R_(normal(of.M, of.r, 3)),
        rest_(normal(of.M, of.r, 4)) {
    x_.data[Integers<Bf16>::kMargin + x_.stride + 2] = rounded<Bf16>(INFINITY);
  }

  struct Results {
    HiddenResult<Bf16> P;
    GradientResult<Bf16> Q;
  };

  Results run(bool clusters) const {
    const auto& [M, C, r, P, Q, row_tiles, column_tiles, cluster, along_rows, adds_P, adds_Q] = of_;
    sm90::LowRankCut cut{row_tiles, column_tiles, ceil_div(ceil_div(M, 128), row_tiles),
                         ceil_div(ceil_div(C, 128), column_tiles)};
    cut.cluster_of(clusters ? cluster : 1, along_rows, P, Q);
    if (clusters) EXPECT(cut.adds_P == adds_P && cut.adds_Q == adds_Q);
    Scratch scratch;
    Results results{HiddenResult<Bf16>(M, r), GradientResult<Bf16>(C * r)};
    sm90::LowRankPass<Bf16> pass{.X = x_.matrix(),
                                 .L = {L_.matrix(), nullptr},
                                 .R = {R_.matrix(), rest_.matrix().data},
                                 .r = r,
                                 .dropout = Q && P ? kNoDropout : kDropout,
                                 .Q_transposed = !P,
                                 .P = results.P.hidden(1.25f, 0.3f),
                                 .Q = results.Q.gradient(r % 2 == 0, 0.3f)};
    if (!P) pass.L = {};
    if (!Q) pass.R = {};
    Gradients<Bf16> left;
    simt::launches().clear();
    if (Q) {
      sm90::launch_low_rank<Bf16, sm90::Major::kMN>(pass, cut, left, scratch.allocator(), nullptr);
    } else {
      sm90::launch_low_rank<Bf16, sm90::Major::kK>(pass, cut, left, scratch.allocator(), nullptr);
    }
    left.launch(nullptr);
    scratch.check_margins();
    if (clusters) check_counts(cut);
    return results;
  }

 private:
  // Blocks read from each other each sum that another block has made, once; and R together.
  void check_counts(const sm90::LowRankCut& cut) const {
    const auto& counts = simt::launches().front();
    const int64_t width = of_.r <= 16 ? 16 : (of_.r <= 32 ? 32 : 128);
    const int64_t rows = ceil_div(of_.M, 128), columns = ceil_div(of_.C, 128);
    const int64_t sums = (of_.adds_P ? rows : columns) * 128 * width * 4;
    EXPECT(counts.cluster_bytes == (cut.adders() - 1) * sums);
    const int64_t of_R = rows * cut.column_blocks / (of_.along_rows ? 1 : of_.cluster);
    EXPECT(counts.tma_read_bytes ==
           2 * 128 * (rows * columns * (128 + of_.P * width) + of_R * 2 * of_.Q * width));
  }

  static Integers<Bf16> normal(int64_t rows, int64_t columns, unsigned seed) {
    Integers<Bf16> matrix(rows, columns, seed);
    const auto values = normal_values<Bf16>(static_cast<size_t>(rows * columns), seed);
    for (int64_t i = 0; i < rows * columns; ++i) {
      matrix.data[Integers<Bf16>::kMargin + i / columns * matrix.stride + i % columns] = values[i];
    }
    return matrix;
  }

  ClusterCase of_;
  Integers<Bf16> x_, L_, R_, rest_;
};

template <class E>
bool same_bits(const std::vector<E>& a, const std::vector<E>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
}

CASE(clusters_make_the_same_results) {
  // P with several tiles of rows and fewer columns in the last block; and beside it Q in parts.
  // Q with several tiles of columns. R that is shared, of two boxes of ranks. Q of one block.
  constexpr ClusterCase kCases[] = {{530, 1336, 10, true, false, 3, 3, 4, false, true, false},
                                    {290, 840, 10, true, true, 3, 2, 4, false, true, false},
                                    {410, 300, 24, true, true, 1, 3, 4, true, false, true},
                                    {900, 300, 24, false, true, 2, 2, 4, true, false, true},
                                    {530, 500, 72, false, true, 3, 1, 2, false, false, false},
                                    {270, 500, 72, false, true, 3, 2, 2, false, false, true},
                                    {130, 1000, 72, true, false, 1, 1, 8, false, true, false}};
  for (const ClusterCase& one : kCases) {
    const ClusterPass pass(one);
    const auto expected = pass.run(false);
    int schedule = 0;
    for_each_schedule([&] {
      const int turn = schedule++;  // all schedules, but not with all cases: they take a while
      if ((turn + turn / 4 + (&one - kCases)) % (one.r > 64 ? 4 : 2) != 0) return;
      const auto results = pass.run(true);
      EXPECT(same_bits(results.P.sums, expected.P.sums));
      EXPECT(same_bits(results.P.value, expected.P.value));
      EXPECT(same_bits(results.P.remainder, expected.P.remainder));
      EXPECT(same_bits(results.Q.full, expected.Q.full));
      EXPECT(same_bits(results.Q.near, expected.Q.near));
    });
  }
}

CASE(clusters_can_be_switched_off) {
  const DownCheck<Bf16> down({130, 1000, 9, false, 16}, kDropout);
  down.check();
  EXPECT(simt::recorded().front().cluster.x == 8);
  setenv("LORA_EXT_CUDA_OFF", "cluster", 1);
  down.check();
  unsetenv("LORA_EXT_CUDA_OFF");
  for (const auto& launch : simt::recorded()) EXPECT(launch.cluster.x == 1);
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
  return {row_tiles,           column_tiles, 32768,        32768 + (P ? operand : 0),
          Q ? 2 * operand : 0, P ? sums : 0, Q ? sums : 0, Q ? sm90::most_column_tiles(rank) : 0};
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
  EXPECT(cut(false, true).row_blocks == 4);     // of dA
  EXPECT(cut(true, true).column_blocks == 8 && cut(true, true).row_blocks == 16);
  // Of 128 ranks: dh and dB by themselves
  EXPECT(sm90::choose_cut(size_of(32, 32, true, false, 128), 132).column_blocks == 4);
  EXPECT(sm90::choose_cut(size_of(32, 32, false, true, 128), 132).row_blocks == 4);
}

CASE(a_ring_holds_what_fits) {
  using Shape = sm90::LowRankShape<64, true, true, sm90::Major::kMN>;
  const auto [stages, stage_bytes, R_tiles, R_bytes, barriers, bytes] =
      sm90::layout_for<Shape>(1, 2, 250, 4);
  EXPECT(stages == 3 && stage_bytes == 3 * 16384 && R_bytes == 2 * 16384);
  EXPECT(R_tiles == stages * stage_bytes && barriers == R_tiles + 2 * R_bytes);
  EXPECT(bytes <= 227 * 1024 && bytes + stage_bytes > 227 * 1024);
  EXPECT(sm90::layout_for<Shape>(1, 2, 2, 1).stages == 2);
}

CASE(only_what_is_wanted) {
  const UpGradCheck<Bf16> up_grad(kSeveralBlocks);
  up_grad.check(true, false);
  up_grad.check(false, true);
}
#endif

}  // namespace
