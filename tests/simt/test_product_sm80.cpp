// csrc/kernels/product_sm80.h against float64.

#include "kernels/product_sm80.h"
#include "product_check.h"

namespace {

using namespace simt_test;

template <class T, BLayout kLayout>
void check_product(Sizes size, double unit) {
  using Shape = sm80::ProductShape<64, 64, 32, 32, 3>;
  ProductCheck<T, kLayout> problem(size);
  const auto tiles = [](int64_t length, int64_t step) { return (length + step - 1) / step; };
  const dim3 grid(static_cast<unsigned>(tiles(size.M, Shape::kM) * tiles(size.N, Shape::kN)));
  for_each_schedule([&] {
    for (const bool reads_bits : {false, true}) {
      if (kLayout == BLayout::kColumns && reads_bits) continue;  // forward drops nothing
      arch::launch(sm80::product_sm80_kernel<T, Shape, kLayout>, grid, Shape::kThreads,
                   Shape::kSharedBytes, nullptr, problem.product(reads_bits));
      EXPECT(simt::statistics().ldmatrix_conflicts == 0);
      problem.check(unit);
    }
  });
}

constexpr Sizes kAligned = {37, 72, 136, 16};
constexpr Sizes kUnaligned = {37, 73, 257, 17, false};
constexpr Sizes kSeveralTiles = {130, 136, 64, 8};

CASE(bf16_weight_as_in_forward) {
  check_product<Bf16, BLayout::kColumns>(kAligned, kBf16Unit);
  check_product<Bf16, BLayout::kColumns>(kUnaligned, kBf16Unit);
  check_product<Bf16, BLayout::kColumns>(kSeveralTiles, kBf16Unit);
}

CASE(bf16_weight_as_in_backward) {
  check_product<Bf16, BLayout::kRows>(kAligned, kBf16Unit);
  check_product<Bf16, BLayout::kRows>(kUnaligned, kBf16Unit);
  check_product<Bf16, BLayout::kRows>(kSeveralTiles, kBf16Unit);
}

#if !defined(BF16_ONLY)
CASE(fp16) {
  check_product<Fp16, BLayout::kColumns>(kAligned, kFp16Unit);
  check_product<Fp16, BLayout::kRows>(kUnaligned, kFp16Unit);
}
#endif

}  // namespace
