// lora_linear on rows that have an adapter of their own each, as in decoding: lora_A and lora_B are
// read once, as they lie. Packing them would cost more than all products of one row.
#pragma once

#include <type_traits>

#include "../lora_linear_kernels.h"
#include "gemm.h"
#include "rows.h"
#include "transpose.h"

namespace lora_ext::LORA_EXT_ISA {

template <class S>
int64_t single_rows_bytes(int64_t K, int64_t r) {
  return (K + r) * static_cast<int64_t>(sizeof(S)) + 2 * keep_words(K);
}

// sums[i] = sum_k a[k] b[i * K + k] in D: rows of b together, which share what is read of a.
template <int kRows, class D, class S, class T>
void dots_in(int64_t K, const S* a, const T* b, double* sums) {
  using V = Vec<D>;
  typename V::Reg even[kRows], odd[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) even[i] = odd[i] = V::zero();
  int64_t k = 0;
  for (; k + 2 * V::kWidth <= K; k += 2 * V::kWidth) {
    const auto first = V::load(a + k), second = V::load(a + k + V::kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      even[i] = V::fma(first, V::load(b + i * K + k), even[i]);
      odd[i] = V::fma(second, V::load(b + i * K + k + V::kWidth), odd[i]);
    }
  }
  for (; k < K; k += V::kWidth) {
    const int lanes = static_cast<int>(at_most(K - k, V::kWidth));
    const auto rest = V::load_partial(a + k, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      even[i] = V::fma(rest, V::load_partial(b + i * K + k, lanes), even[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) sums[i] = V::sum(V::add(even[i], odd[i]));
}

// B h, for `height` rows of B [.., r].
template <class S, class T>
typename Vec<S>::Reg block_times(const T* B, int64_t r, int height, const S* h) {
  using V = Vec<S>;
  typename V::Reg sums[V::kWidth];
#pragma GCC unroll 16
  for (int l = 0; l < V::kWidth; ++l) sums[l] = V::zero();
  int64_t k = 0;
  for (; height == V::kWidth && k + V::kWidth <= r; k += V::kWidth) {
    const auto part = V::load(h + k);
#pragma GCC unroll 16
    for (int l = 0; l < V::kWidth; ++l) sums[l] = V::fma(V::load(B + l * r + k), part, sums[l]);
  }
  for (; k < r; k += V::kWidth) {
    const int lanes = static_cast<int>(at_most(r - k, V::kWidth));
    const auto part = V::load_partial(h + k, lanes);
#pragma GCC unroll 16
    for (int l = 0; l < V::kWidth; ++l) {
      if (l < height) sums[l] = V::fma(V::load_partial(B + l * r + k, lanes), part, sums[l]);
    }
  }
  return sums_of_block<S>(sums);
}

// As lora_linear_forward_rows, but for lora_A and lora_B, which are not packed.
template <class T, class TA>
void lora_linear_single_rows(const LoraLinearForwardArgs& args, int64_t begin, int64_t end,
                             void* scratch) {
  using S = compute_t<T>;
  using V = Vec<S>;
  // Of 16-bit adapters in the compute type: their rounding is what shows.
  using D = std::conditional_t<std::is_same_v<S, TA>, double, S>;
  const int64_t K = args.K, N = args.N, r = args.r;
  const auto* A = static_cast<const TA*>(args.lora_A);
  const auto* B = static_cast<const TA*>(args.lora_B);
  const auto* bias = static_cast<const S*>(args.bias);
  auto* const x = static_cast<S*>(scratch);
  auto* const h = x + K;
  auto* const keep = reinterpret_cast<uint16_t*>(h + r);
  for (int64_t m = begin; m < end; ++m) {
    const uint16_t* kept = fill_panel_bits(args.dropout, m, 1, K, keep);
    copy_kept(static_cast<const T*>(args.x) + m * args.ldx, args.ldx, 1, K, kept, keep_words(K), x,
              K);
    const double scaling = args.scaling * (args.row_factors ? args.row_factors[m] : 1.0);
    const auto keep_dots = [&](int64_t j, int count, const double* dots) {
      for (int i = 0; i < count; ++i) {
        const double hidden = dots[i] * args.dropout.survivor;
        if (args.h) static_cast<S*>(args.h)[m * r + j + i] = static_cast<S>(hidden);
        h[j + i] = static_cast<S>(scaling * hidden);
      }
    };
    constexpr int kDots = 4;
    double dots[kDots];
    int64_t j = 0;
    for (; j + kDots <= r; j += kDots) {
      dots_in<kDots, D>(K, x, A + j * K, dots);
      keep_dots(j, kDots, dots);
    }
    for (; j < r; ++j) {
      dots_in<1, D>(K, x, A + j * K, dots);
      keep_dots(j, 1, dots);
    }
    T* const y = static_cast<T*>(args.y) + m * N;
    for (int64_t n = 0; n < N; n += V::kWidth) {  // a vector of outputs
      const int height = static_cast<int>(at_most(N - n, V::kWidth));
      auto sum = block_times<S>(B + n * r, r, height, h);
      if (bias) sum = V::add(sum, load_lanes<S>(bias + n, height));
      if (args.add_y) sum = V::add(sum, load_lanes<S>(y + n, height));
      store_lanes<S>(y + n, sum, height);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
