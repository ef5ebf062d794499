// The product of several segments, csrc/kernels/gemm_sm80.h, against float64.

#include "check.h"
#include "kernels/gemm_sm80.h"

namespace {

using namespace lora_ext;
using namespace lora_ext::sm80;
using namespace simt_test;

// A row-major matrix of normal values.
template <class T>
struct Values {
  Values(int64_t rows, int64_t columns, unsigned seed)
      : rows(rows), columns(columns), data(normal_values<T>(rows * columns, seed)) {}
  Matrix<T> matrix() const { return {data.data(), rows, columns, columns}; }
  double at(int64_t row, int64_t column) const { return to_float(data[row * columns + column]); }

  int64_t rows, columns;
  std::vector<T> data;
};

struct Sizes {
  int64_t M, N, K, r;
  bool aligned;
};

template <class T, BLayout kLayout>
void check_gemm(Sizes size, double unit) {
  constexpr bool kColumns = kLayout == BLayout::kColumns;
  const auto& [M, N, K, r, aligned] = size;
  const auto b_of = [N = N](int64_t k, unsigned seed) {
    return kColumns ? Values<T>(N, k, seed) : Values<T>(k, N, seed);
  };
  const Values<T> a[] = {{M, K, 1}, {M, r, 2}}, b[] = {b_of(K, 3), b_of(r, 4)};
  const Values<float> bias(1, N, 5);
  std::vector<T> out(M * N, T{0x7FFF});  // NaN in both types

  GemmParams<T> params{};
  params.count = 2;
  params.masked = -1;
  params.aligned = aligned;
  params.bias = bias.data.data();
  params.out = out.data();
  params.M = M, params.N = N;
  for (int s = 0; s < 2; ++s) params.segments[s] = {a[s].matrix(), b[s].matrix()};

  using Shape = GemmShape<64, 64, 32, 32, 3>;
  const dim3 grid(static_cast<unsigned>((N + Shape::kN - 1) / Shape::kN),
                  static_cast<unsigned>((M + Shape::kM - 1) / Shape::kM));
  arch::launch(gemm_kernel<T, Shape, kLayout>, grid, Shape::kThreads, Shape::kSharedBytes, nullptr,
               params);
  EXPECT(simt::statistics().ldmatrix_conflicts == 0);

  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double expected = bias.at(0, n), size_of_terms = std::fabs(expected);
      for (int s = 0; s < 2; ++s) {
        for (int64_t k = 0; k < a[s].columns; ++k) {
          const double term = a[s].at(m, k) * (kColumns ? b[s].at(n, k) : b[s].at(k, n));
          expected += term;
          size_of_terms += std::fabs(term);
        }
      }
      // One rounding of the result, and those of the sums in float.
      const double bound = unit * std::fabs(expected) + 0x1p-22 * size_of_terms;
      EXPECT(std::fabs(to_float(out[m * N + n]) - expected) <= bound);
    }
  }
}

constexpr double kBf16Unit = 0x1p-8, kFp16Unit = 0x1p-11;
constexpr Sizes kAligned = {37, 72, 136, 16, true};
constexpr Sizes kUnaligned = {37, 73, 257, 17, false};
constexpr Sizes kSeveralTiles = {130, 136, 72, 8, true};

CASE(bf16_weight_as_in_forward) {
  for_each_schedule([] {
    check_gemm<Bf16, BLayout::kColumns>(kAligned, kBf16Unit);
    check_gemm<Bf16, BLayout::kColumns>(kUnaligned, kBf16Unit);
    check_gemm<Bf16, BLayout::kColumns>(kSeveralTiles, kBf16Unit);
  });
}

CASE(bf16_weight_as_in_backward) {
  for_each_schedule([] {
    check_gemm<Bf16, BLayout::kRows>(kAligned, kBf16Unit);
    check_gemm<Bf16, BLayout::kRows>(kUnaligned, kBf16Unit);
  });
}

CASE(fp16) {
  for_each_schedule([] {
    check_gemm<Fp16, BLayout::kColumns>(kAligned, kFp16Unit);
    check_gemm<Fp16, BLayout::kRows>(kUnaligned, kFp16Unit);
  });
}

}  // namespace
