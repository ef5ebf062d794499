// csrc/kernels/product_sm90.h against float64, with what it reads and multiplies.

#include <set>

#include "kernels/launch_product_sm90.h"
#include "product_check.h"

namespace {

using namespace simt_test;

// A ring of two stages, so that it turns often.
using Small = sm90::ProductShape<128, 2>;

template <class T, class Shape, BLayout kLayout>
void check_product(Sizes size, double unit, uint64_t seeds = 4) {
  constexpr bool kColumns = kLayout == BLayout::kColumns;
  ProductCheck<T, kLayout> problem(size);
  constexpr auto kMajor = kColumns ? sm90::Major::kK : sm90::Major::kMN;
  const auto steps = [](int64_t depth, int step) { return (depth + step - 1) / step; };
  for (const int cluster : {1, 2}) {
    const int64_t tiles = steps(steps(size.M, 128), cluster) * cluster * steps(size.N, Shape::kN);
    const int64_t stages = tiles * (steps(size.K, 64) + steps(size.r, 64));
    for_each_schedule(seeds, [&] {
      // Two clusters, or two blocks
      for (const bool reads_bits : {false, true}) {
        if (kColumns && reads_bits) continue;  // forward drops nothing
        const Product<T> product = problem.product(reads_bits);
        sm90::launch_product_tiles<T, Shape, kMajor>({&product, 1}, cluster, 2 * cluster, nullptr);
        problem.check(unit);
        const simt::Statistics& counts = simt::statistics();
        EXPECT(counts.tma_bytes == stages * (128 + Shape::kN) * 64 * 2);
        EXPECT(counts.tma_read_bytes == stages * (128 + Shape::kN / cluster) * 64 * 2);
        EXPECT(counts.tma_stored_bytes == size.M * size.N * 2 && counts.stmatrix_conflicts == 0);
        EXPECT(counts.wgmma == tiles * 2 * (steps(size.K, 16) + steps(size.r, 16)));
      }
    });
  }
}

constexpr Sizes kOneTile = {37, 72, 328, 16};
constexpr Sizes kSeveralTiles = {200, 264, 128, 80};

// ---- The order of tiles ------------------------------------------------------------------------

CASE(every_tile_once) {
  for (const int rows : {1, 15, 16, 17, 50}) {
    for (const int columns : {1, 7, 8}) {
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < rows * columns; ++i) {
        const auto [row, column] = sm90::tile_at(i, rows, columns, 16);
        EXPECT(row >= 0 && row < rows && column >= 0 && column < columns);
        seen.insert({row, column});
      }
      EXPECT(static_cast<int>(seen.size()) == rows * columns);
    }
  }
}

CASE(tiles_of_one_wave_are_a_square) {
  std::set<int> rows, columns;
  for (int i = 0; i < 128; ++i) {
    const auto [row, column] = sm90::tile_at(i, 64, 64, 16);
    rows.insert(row), columns.insert(column);
  }
  EXPECT(rows.size() == 16 && columns.size() == 8);
}

// ---- The width of tiles, and clusters ----------------------------------------------------------

// On 132 multiprocessors. Alone a tile of 256 columns waits for L2: 384 rows of 128 bytes at 46 a
// cycle. Two share what they read of B, and wait for the tensor cores.
CASE(the_cheapest_tiles_are_chosen) {
  const auto chosen = [](int64_t M, int64_t N, int most_cluster, int columns, int cluster,
                         int64_t cycles) {
    const sm90::ProductTiles tiles = sm90::choose_tiles(M, std::span(&N, 1), 132, most_cluster);
    return tiles.columns == columns && tiles.cluster == cluster && tiles.cycles == cycles;
  };
  EXPECT(chosen(8192, 8192, 1, 256, 1, 16 * 1068));  // 2048 tiles
  EXPECT(chosen(8192, 8192, 2, 256, 2, 16 * 1024));
  EXPECT(chosen(1024, 2048, 2, 128, 2, 534));  // narrower ones would take two turns
  EXPECT(chosen(128, 1024, 2, 64, 1, 534));    // no row of tiles for a neighbour
  EXPECT(chosen(1, 1, 2, 64, 1, 534));
  // Of 768 rows and 11264 columns 264 wide tiles and 1056 narrow ones
  EXPECT(chosen(768, 11264, 1, 256, 1, 2 * 1068));
  // A single multiprocessor has no neighbour
  const int64_t wide = 8192;
  EXPECT(sm90::choose_tiles(8192, std::span(&wide, 1), 1, 2).cluster == 1);
}

// Llama 3's gate and up of 8192 rows: each has 1792 pairs of wide tiles for 66 clusters.
CASE(products_share_the_last_turn) {
  const auto cycles = [](std::vector<int64_t> widths) {
    return sm90::choose_tiles(8192, widths, 132, 2).cycles;
  };
  EXPECT(cycles({14336}) == 28 * 1024);
  EXPECT(cycles({14336, 14336}) == 55 * 1024);
}

CASE(clusters_can_be_switched_off) {
  EXPECT(sm90::most_cluster() == 2);
  setenv("LORA_EXT_CUDA_OFF", "cluster", 1);
  EXPECT(sm90::most_cluster() == 1);
  setenv("LORA_EXT_CUDA_OFF", "cluster,clutser", 1);
  expect_error([] { sm90::most_cluster(); },
               {"LORA_EXT_CUDA_OFF: got 'clutser', expected of 'cluster'"});
  setenv("LORA_EXT_CUDA_OFF", "", 1);
  EXPECT(sm90::most_cluster() == 2);
  unsetenv("LORA_EXT_CUDA_OFF");
}

// ---- Products, small ones first: a planted mistake ends the program (test_kernel_mistakes.py) --

// Every lane fences what it stored itself.
CASE(stores_are_seen_by_tma) {
  simt::options().watch_stores = true;
  ProductCheck<Bf16, BLayout::kColumns> problem(kOneTile);
  const Product<Bf16> product = problem.product();
  sm90::launch_product_tiles<Bf16, Small, sm90::Major::kK>({&product, 1}, 1, 2, nullptr);
  problem.check(kBf16Unit);
}

// Of several results each has columns of tiles of its own, the last of which are not whole.
CASE(products_beside_each_other) {
  using Check = ProductCheck<Bf16, BLayout::kColumns>;
  Check problems[] = {Check({200, 72, 136, 16}), Check({200, 264, 72, 80}),
                      Check({200, 128, 136, 8})};
  for (const int cluster : {1, 2}) {
    for_each_schedule([&] {
      const Product<Bf16> products[] = {problems[0].product(), problems[1].product(),
                                        problems[2].product()};
      sm90::launch_product_tiles<Bf16, Small, sm90::Major::kK>({products, 3}, cluster, 2 * cluster,
                                                               nullptr);
      for (const Check& problem : problems) problem.check(kBf16Unit);
      const int64_t steps = 1 * (3 + 1) + 3 * (2 + 2) + 1 * (3 + 1);  // of tiles of 128 columns
      EXPECT(simt::statistics().tma_bytes == 2 * steps * (128 + 128) * 64 * 2);
      EXPECT(simt::statistics().tma_stored_bytes == 200 * (72 + 264 + 128) * 2);
    });
  }
}

CASE(bf16_weight_as_in_forward) {
  check_product<Bf16, Small, BLayout::kColumns>(kOneTile, kBf16Unit);
  check_product<Bf16, Small, BLayout::kColumns>(kSeveralTiles, kBf16Unit);
}

CASE(bf16_weight_as_in_backward) {
  check_product<Bf16, Small, BLayout::kRows>(kOneTile, kBf16Unit);
  check_product<Bf16, Small, BLayout::kRows>(kSeveralTiles, kBf16Unit);
  check_product<Bf16, sm90::ProductShape<64, 2>, BLayout::kRows>(kOneTile, kBf16Unit);
}

#if !defined(BF16_ONLY)
// What waits for what is as above: one seed is enough.
CASE(fp16_and_other_tiles) {
  using Wide = sm90::ProductShape<256, 4>;
  using Narrow = sm90::ProductShape<64, 8>;
  check_product<Fp16, Wide, BLayout::kColumns>({129, 328, 200, 24}, kFp16Unit, 1);
  check_product<Fp16, Wide, BLayout::kRows>({65, 264, 72, 8}, kFp16Unit, 1);
  check_product<Fp16, Narrow, BLayout::kRows>({129, 200, 72, 8}, kFp16Unit, 1);
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
