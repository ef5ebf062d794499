// The passes that walk rows, of DoRA and embeddings, checked and timed beside the others of a case:
// weight [N, K] is the norm's and, as a table of N tokens, the embedding's.
#pragma once

#include "full_problem.h"
#include "kernels/column_scale.h"
#include "kernels/lora_embedding.h"
#include "kernels/weight_norm.h"
#include "pass.h"

namespace gpu_bench {

// out [rows.count, columns] = of(row, column), in double
template <class Of>
struct ExpectParams {
  Of of;
  Sample rows;
  int64_t columns;
  double* out;
};

template <class Of>
__global__ void __launch_bounds__(kElementThreads)
    expect_kernel(const __grid_constant__ ExpectParams<Of> params) {
  const int64_t i = element_index();
  if (i >= params.rows.count * params.columns) return;
  params.out[i] = params.of(row_of(params.rows, i / params.columns), i % params.columns);
}

template <class TA>
struct NormOf {
  const Bf16* weight;  // [N, K]
  const TA *lora_A, *lora_B;
  int64_t K;
  int r;

  LORA_EXT_DEVICE double operator()(int64_t n, int64_t) const {
    double sum = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      double value = to_float(weight[n * K + k]);
      for (int j = 0; j < r; ++j) {
        value += kScaling * double{to_float(lora_B[n * r + j])} * to_float(lora_A[j * K + k]);
      }
      sum += value * value;
    }
    return sqrt(sum);
  }
};

struct ScaledOf {
  const Bf16* z;               // [M, N]
  const float *scale, *shift;  // [N]; shift may be null
  int64_t N;

  LORA_EXT_DEVICE double operator()(int64_t m, int64_t n) const {
    return double{to_float(z[m * N + n])} * scale[n] + (shift ? shift[n] : 0.0f);
  }
};

// Of one column: the sum of dy * z, or of dy.
struct ColumnSumOf {
  const Bf16 *dy, *z;  // [M, N]; z may be null
  int64_t M, N;

  LORA_EXT_DEVICE double operator()(int64_t n, int64_t) const {
    double sum = 0.0;
    for (int64_t m = 0; m < M; ++m) {
      sum += double{to_float(dy[m * N + n])} * (z ? to_float(z[m * N + n]) : 1.0f);
    }
    return sum;
  }
};

template <class TA>
struct EmbeddingOf {
  const int64_t* tokens;  // [M]
  const Bf16* weight;     // [V, D]
  const TA* lora_A;       // [r, V]
  const TA* lora_B;       // [D, r]
  int64_t V, D;
  int r;

  LORA_EXT_DEVICE double operator()(int64_t m, int64_t d) const {
    double sum = 0.0;
    for (int j = 0; j < r; ++j) {
      sum += double{to_float(lora_A[j * V + tokens[m]])} * to_float(lora_B[d * r + j]);
    }
    return to_float(weight[tokens[m] * D + d]) + kScaling * sum;
  }
};

struct TokensParams {
  int64_t* tokens;
  int64_t count, most;
};

__global__ void __launch_bounds__(kElementThreads)
    tokens_kernel(const __grid_constant__ TokensParams params) {
  const int64_t i = element_index();
  if (i >= params.count) return;
  params.tokens[i] = static_cast<int64_t>(dropout_bits({6, 0}, i, 0, 0).word[0] % params.most);
}

template <class TA>
class RowPasses {
 public:
  explicit RowPasses(Problem<TA>& problem) : p_(problem) {
    const auto [M, N] = std::tuple(p_.c.M, p_.c.N);
    z_ = memory_.fresh<Bf16>(size_t(M * N));
    fill_normal(z_, M * N, 7, 1.0);
    for (float** vector : {&scale_, &shift_, &norms_, &dscale_, &dshift_}) {
      *vector = memory_.fresh<float>(size_t(N));
    }
    fill_normal(scale_, N, 8, 1.0), fill_normal(shift_, N, 9, 1.0);
    tokens_ = memory_.fresh<int64_t>(size_t(M));
    launch_elements(tokens_kernel, M, nullptr, TokensParams{tokens_, M, N});
  }

  void add_to(std::vector<Pass>& passes) {
    const auto [M, K, N, r] = std::tuple(p_.c.M, p_.c.K, p_.c.N, int64_t{p_.c.r});
    const double of_y = 2.0 * double(M) * double(N), of_W = 2.0 * double(N) * double(K);
    const double of_x = 2.0 * double(M) * double(K), adapters = sizeof(TA) * double((N + K) * r);
    passes.push_back({"weight_norm", "", of_W * double(r) + of_W, of_W + adapters,
                      [=, this] { weight_norm(); },
                      [=, this] {
                        return std::vector{error_of("norms", Made<float>{norms_, 1, N, 1, false},
                                                    1.0, expected_norms(), of_sum(K))};
                      }});
    passes.push_back({"column_scale", "", of_y, 2 * of_y, [=, this] { column_scale(); },
                      [=, this] {
                        const ScaledOf of{z_, scale_, shift_, N};
                        return std::vector{error_of("y", Made<Bf16>{p_.y, 1, M, N, false}, 1.0,
                                                    expected(of, M, kResultRows, N),
                                                    kRounding + of_sum(1))};
                      }});
    passes.push_back(
        {"column_scale backward", "", 2 * of_y, 3 * of_y, [=, this] { column_scale_backward(); },
         [=, this] {
           const auto sums = [&](const Bf16* z) {
             return expected(ColumnSumOf{p_.dy, z, M, N}, N, kGradientRows, 1);
           };
           const ScaledOf of{p_.dy, scale_, nullptr, N};
           return std::vector{
               error_of("dz", Made<Bf16>{p_.y, 1, M, N, false}, 1.0,
                        expected(of, M, kResultRows, N), kRounding + of_sum(1)),
               error_of("dscale", Made<float>{dscale_, 1, N, 1, false}, 1.0, sums(z_), of_sum(M)),
               error_of("dbias", Made<float>{dshift_, 1, N, 1, false}, 1.0, sums(nullptr),
                        of_sum(M))};
         }});
    passes.push_back(
        {"lora_embedding", "", of_x * double(r), 2 * of_x + adapters,
         [=, this] { lora_embedding(); },
         [=, this] {
           const EmbeddingOf<TA> of{tokens_, p_.weight, p_.lora_B, p_.lora_A, N, K, p_.c.r};
           return std::vector{error_of("y", Made<Bf16>{p_.dx, 1, M, K, false}, 1.0,
                                       expected(of, M, kResultRows, K), kRounding + of_sum(r))};
         }});
  }

 private:
  template <class Of>
  Expected expected(const Of& of, int64_t rows, int64_t most, int64_t columns) {
    const Sample sample = Sample::of(rows, most);
    double* const out = memory_.fresh<double>(size_t(sample.count * columns));
    launch_elements(expect_kernel<Of>, sample.count * columns, nullptr,
                    ExpectParams<Of>{of, sample, columns, out});
    return {sample, columns, out};
  }
  Expected expected_norms() {
    const NormOf<TA> of{p_.weight, p_.lora_A, p_.lora_B, p_.c.K, p_.c.r};
    return expected(of, p_.c.N, kGradientRows, 1);
  }

  Allocator scratch() {
    p_.scratch.reset();
    return p_.scratch.allocator();
  }
  void weight_norm() {
    const WeightNormCall<Bf16, TA> call{p_.weight_matrix(),  p_.lora_A, p_.lora_B, p_.c.r, kScaling,
                                        /*by_column=*/false, norms_};
    run_weight_norm(call, scratch(), nullptr);
  }
  void column_scale() {
    const Matrix<Bf16> z{z_, p_.c.M, p_.c.N, p_.c.N};
    run_column_scale(ColumnScaleCall<Bf16>{z, scale_, shift_, p_.y}, nullptr);
  }
  void column_scale_backward() {
    const Matrix<Bf16> z{z_, p_.c.M, p_.c.N, p_.c.N};
    run_column_scale_backward(
        ColumnScaleBackwardCall<Bf16>{p_.dy_matrix(), z, scale_, p_.y, dscale_, dshift_}, scratch(),
        nullptr);
  }
  // The adapters' memory as matrices of the other sizes.
  void lora_embedding() {
    const EmbeddingCall<Bf16, TA> call{tokens_,   p_.c.M, p_.weight_matrix(), p_.lora_B,
                                       p_.lora_A, p_.c.r, kScaling,           p_.dx};
    run_lora_embedding(call, nullptr);
  }

  Problem<TA>& p_;
  gpu_test::Memory memory_;
  Bf16* z_;                                             // [M, N]
  float *scale_, *shift_, *norms_, *dscale_, *dshift_;  // [N]
  int64_t* tokens_;                                     // [M]
};

}  // namespace gpu_bench
