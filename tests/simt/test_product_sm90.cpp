// csrc/kernels/product_sm90.h against float64, with what it reads and multiplies.

#include <set>

#include "kernels/launch_product_sm90.h"
#include "product_check.h"

namespace {

using namespace simt_test;

// A ring of two stages, so that it turns often.
using Small = sm90::ProductShape<128, 2>;

template <class T, class Shape, BLayout kLayout>
void check_product(Sizes size, double unit) {
  constexpr bool kColumns = kLayout == BLayout::kColumns;
  ProductCheck<T, kLayout> problem(size);
  constexpr int kMultiprocessors = 2;
  constexpr auto kMajor = kColumns ? sm90::Major::kK : sm90::Major::kMN;
  const auto steps = [](int64_t depth, int step) { return (depth + step - 1) / step; };
  const int64_t tiles = steps(size.M, 128) * steps(size.N, Shape::kN);
  for_each_schedule([&] {
    sm90::launch_product_tiles<T, Shape, kMajor>(problem.product(), kMultiprocessors, nullptr);
    problem.check(unit);
    const simt::Statistics& counts = simt::statistics();
    EXPECT(counts.tma_bytes ==
           tiles * (steps(size.K, 64) + steps(size.r, 64)) * (128 + Shape::kN) * 64 * 2);
    EXPECT(counts.tma_stored_bytes == size.M * size.N * 2 && counts.stmatrix_conflicts == 0);
    EXPECT(counts.wgmma == tiles * 2 * (steps(size.K, 16) + steps(size.r, 16)));
  });
}

constexpr Sizes kOneTile = {37, 72, 328, 16};
constexpr Sizes kSeveralTiles = {200, 264, 128, 80};

CASE(bf16_weight_as_in_forward) {
  check_product<Bf16, Small, BLayout::kColumns>(kOneTile, kBf16Unit);
  check_product<Bf16, Small, BLayout::kColumns>(kSeveralTiles, kBf16Unit);
}

CASE(bf16_weight_as_in_backward) {
  check_product<Bf16, Small, BLayout::kRows>(kOneTile, kBf16Unit);
  check_product<Bf16, Small, BLayout::kRows>(kSeveralTiles, kBf16Unit);
}

// Every lane fences what it stored itself.
CASE(stores_are_seen_by_tma) {
  simt::options().watch_stores = true;
  ProductCheck<Bf16, BLayout::kColumns> problem(kOneTile);
  sm90::launch_product_tiles<Bf16, Small, sm90::Major::kK>(problem.product(), 2, nullptr);
  problem.check(kBf16Unit);
}

// ---- The order of tiles ------------------------------------------------------------------------

CASE(every_tile_once) {
  for (const int64_t rows : {1, 15, 16, 17, 50}) {
    for (const int64_t columns : {1, 7, 8}) {
      std::set<std::pair<int64_t, int64_t>> seen;
      for (int64_t i = 0; i < rows * columns; ++i) {
        const auto [row, column] = sm90::tile_at(i, rows, columns);
        EXPECT(row >= 0 && row < rows && column >= 0 && column < columns);
        seen.insert({row, column});
      }
      EXPECT(static_cast<int64_t>(seen.size()) == rows * columns);
    }
  }
}

CASE(tiles_of_one_wave_are_a_square) {
  std::set<int64_t> rows, columns;
  for (int64_t i = 0; i < 128; ++i) {
    const auto [row, column] = sm90::tile_at(i, 64, 64);
    rows.insert(row), columns.insert(column);
  }
  EXPECT(rows.size() == 16 && columns.size() == 8);
}

// ---- The width of tiles ------------------------------------------------------------------------

// On 132 multiprocessors; a stage has (128 + width) rows of 128 bytes.
CASE(the_cheapest_tiles_are_chosen) {
  const auto chosen = [](int64_t M, int64_t N, int columns, int64_t bytes) {
    const sm90::ProductTiles tiles = sm90::choose_tiles(M, N, 132);
    return tiles.columns == columns && tiles.bytes == bytes;
  };
  EXPECT(chosen(8192, 8192, 256, 16 * 384 * 128));  // 2048 tiles
  EXPECT(chosen(1024, 2048, 128, 1 * 256 * 128));   // narrower ones would take two turns
  EXPECT(chosen(128, 1024, 64, 1 * 192 * 128));
  EXPECT(chosen(1, 1, 64, 1 * 192 * 128));
  // Of 768 rows and 11264 columns 264 wide tiles and 1056 narrow ones cost the same
  EXPECT(chosen(768, 11264, 256, 2 * 384 * 128));
}

#if !defined(BF16_ONLY)
CASE(fp16_and_other_tiles) {
  using Wide = sm90::ProductShape<256, 4>;
  using Narrow = sm90::ProductShape<64, 8>;
  check_product<Fp16, Wide, BLayout::kColumns>({129, 328, 200, 24}, kFp16Unit);
  check_product<Fp16, Wide, BLayout::kRows>({65, 264, 72, 8}, kFp16Unit);
  check_product<Fp16, Narrow, BLayout::kRows>({129, 200, 72, 8}, kFp16Unit);
}

CASE(tensor_map_that_the_driver_refuses) {
  const std::vector<Bf16> data(64);
  bool refused = false;
  try {
    sm90::tensor_map(Matrix<Bf16>{data.data() + 1, 2, 8, 8}, 64, 64, arch::Swizzle::k128);
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("tensor map") != std::string::npos;
  }
  EXPECT(refused);
}
#endif

}  // namespace
