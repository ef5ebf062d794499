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
    for (int64_t j = 0; j < r; ++j) {
      const double hidden = dot_in<D>(K, x, A + j * K) * args.dropout.survivor;
      if (args.h) static_cast<S*>(args.h)[m * r + j] = static_cast<S>(hidden);
      h[j] = static_cast<S>(scaling * hidden);
    }
    T* const y = static_cast<T*>(args.y) + m * N;
    for (int64_t n = 0; n < N; n += V::kWidth) {  // a vector of outputs: rows of B, transposed
      const int height = static_cast<int>(at_most(N - n, V::kWidth));
      auto sum = V::zero();
      for (int64_t j = 0; j < r; j += V::kWidth) {
        const int width = static_cast<int>(at_most(r - j, V::kWidth));
        typename V::Reg block[V::kWidth];
#pragma GCC unroll 16
        for (int l = 0; l < V::kWidth; ++l) {
          block[l] = l < height ? load_lanes<S>(B + (n + l) * r + j, width) : V::zero();
        }
        transpose_block<S>(block);
#pragma GCC unroll 16
        for (int l = 0; l < V::kWidth; ++l) {
          if (l < width) sum = V::fma(block[l], V::set1(h[j + l]), sum);
        }
      }
      if (bias) sum = V::add(sum, load_lanes<S>(bias + n, height));
      if (args.add_y) sum = V::add(sum, load_lanes<S>(y + n, height));
      store_lanes<S>(y + n, sum, height);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
