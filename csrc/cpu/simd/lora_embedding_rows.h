// lora_embedding on a range of tokens: their columns of lora_A are gathered into a panel, which
// stays in cache while the rows of the weight, or of dy, come past it.
#pragma once

#include "../lora_embedding_kernels.h"
#include "float_math.h"
#include "lora_linear_rows.h"

namespace lora_ext::LORA_EXT_ISA {

// out[i][j] = weight[tokens[i]][j] + result
template <class S, class T>
struct StoreLookedUp {
  T* out;
  int64_t stride;
  const T* weight;
  int64_t ldw;
  const int64_t* tokens;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    const auto base = load_lanes<S>(weight + tokens[i] * ldw + j, lanes);
    store_lanes<S>(out + i * stride + j, Vec<S>::add(base, result), lanes);
  }
};

template <class Math>
int64_t lora_embedding_bytes(int64_t r) {
  return Panel<Math>::bytes(0, r);
}

// h [rows, r] = factor * the tokens' columns of lora_A [r, V]
template <class S, class TA>
void gather_columns(const TA* lora_A, int64_t V, int64_t r, const int64_t* tokens, int64_t rows,
                    S factor, S* h) {
  const auto factors = Vec<S>::set1(factor);
  for (int64_t k = 0; k < r; ++k) {  // row after row: each is a range of memory of its own
    for (int64_t i = 0; i < rows; ++i) {
      const auto value = Vec<S>::load_partial(lora_A + k * V + tokens[i], 1);
      Vec<S>::store_partial(h + i * r + k, Vec<S>::mul(factors, value), 1);
    }
  }
}

template <class Math, class TA>
void lora_embedding_forward_rows(const LoraEmbeddingForwardArgs& args, int64_t begin, int64_t end,
                                 void* scratch) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const int64_t D = args.D, r = args.r;
  const Panel<Math> panel(scratch, r);
  auto* h = static_cast<S*>(panel.operand);
  for (int64_t m = begin; m < end; m += panel.kRows) {
    const int64_t rows = at_most(end - m, panel.kRows);
    const int64_t* tokens = args.tokens + m;
    gather_columns(static_cast<const TA*>(args.lora_A), args.V, r, tokens, rows,
                   static_cast<S>(args.scaling), h);
    Math::product(rows, D, r, LeftRows<S>{h, r, 1}, Math::packed(args.lora_B_t, D),
                  StoreLookedUp<S, T>{static_cast<T*>(args.y) + m * D, D,
                                      static_cast<const T*>(args.weight), args.ldw, tokens});
  }
}

template <class Math, class TA>
void lora_embedding_backward_rows(const LoraEmbeddingBackwardArgs& args, int64_t begin, int64_t end,
                                  void* dB_sum, void* scratch) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const int64_t D = args.D, r = args.r;
  const Panel<Math> panel(scratch, r);
  auto* h = static_cast<S*>(panel.operand);
  auto* dB = static_cast<S*>(dB_sum);
  auto* dh = static_cast<S*>(args.dh);
  const auto B = Math::adapter(args.lora_B, r);
  for (int64_t m = begin; m < end; m += panel.kRows) {
    const int64_t rows = at_most(end - m, panel.kRows);
    const bool later = m > begin;  // the first panel starts the sum, later ones add to it
    if (dB) {
      gather_columns(static_cast<const TA*>(args.lora_A), args.V, r, args.tokens + m, rows, S{1},
                     h);
    }

    // dh = dy B and dB += h^T dy, from one pass over dy
    const auto* dy = static_cast<const T*>(args.dy) + m * args.lddy;
    for_chunks(panel, dy, args.lddy, rows, D, nullptr, [&](int64_t n, const auto& chunk) {
      if (dh) chunk.times(B.from(n), r, n > 0, r == 1, panel.hidden);
      if (dB) chunk.left_times(LeftRows<S>{h, 1, r}, r, later, dB + n, D);
    });
    for (int64_t i = 0; dh && i < rows * r; ++i) {
      dh[m * r + i] = static_cast<S>(args.scaling * panel.hidden[i]);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
