// lora_linear on a range of rows: everything but the base product, which the caller's BLAS adds to
// y and dx afterwards (beta = 1), so that each result is rounded to its storage type once. `Math`
// is the arithmetic: FloatMath, or Bf16DotMath where base and adapters are bf16.
#pragma once

#include "../lora_linear_kernels.h"
#include "rows.h"
#include "store.h"

namespace lora_ext::LORA_EXT_ISA {

// The scratch of one thread, for one panel of rows at a time.
template <class Math>
struct Panel {
  using Hidden = typename Math::Hidden;
  using Element = typename Math::Element;
  static constexpr int64_t kRows = Math::kPanelRows;

  Element* in;     // [kRows, Math::kStride]: a chunk of x or dy, without dropped elements
  Hidden* hidden;  // [kRows, r]: h or dh without their factors
  void* operand;   // what Math makes of it to multiply with: times the factors, rounded once
  uint16_t* keep;  // [kRows, keep_words(K)]

  Panel(void* scratch, int64_t r) {
    in = static_cast<Element*>(scratch);
    hidden = reinterpret_cast<Hidden*>(in + kRows * Math::kStride);
    operand = hidden + kRows * r;
    keep = reinterpret_cast<uint16_t*>(static_cast<char*>(operand) + Math::operand_bytes(r));
  }

  static int64_t bytes(int64_t K, int64_t r) {
    const int64_t row = Math::kStride * static_cast<int64_t>(sizeof(Element)) +
                        r * static_cast<int64_t>(sizeof(Hidden)) + 2 * keep_words(K);
    return kRows * row + Math::operand_bytes(r);
  }
};

// Some columns of the rows of x or dy that a panel is about.
template <class Math, class Data>
struct Chunk {
  const Data* data;
  int64_t stride, rows, columns;
  bool cold;  // read from memory, not from a copy in cache

  // out [rows, r] = this b, or += it
  template <class Right>
  void times(const Right& b, int64_t r, bool add, bool few, typename Math::Hidden* out) const {
    Math::hidden_product(rows, r, columns, Math::left(data, stride, cold), b, add, few, out);
  }

  // out [r, columns], out_stride apart = a this, or += it
  template <class Left>
  void left_times(const Left& a, int64_t r, bool add, typename Math::Sum* out,
                  int64_t out_stride) const {
    Math::sum_of_rows(r, columns, rows, a, Math::right(data, stride, cold),
                      StoreSum<typename Math::Sum>{out, out_stride, add});
  }
};

// Row m of a matrix; null of one that is not given, or has no elements.
template <class T>
const T* row_of(const void* matrix, int64_t m, int64_t stride) {
  return matrix ? static_cast<const T*>(matrix) + m * stride : nullptr;
}

// f(k, chunk) for chunks of the columns [0, K) of in [rows, K], dropped out where keep is given.
template <class Math, class F>
void for_chunks(const Panel<Math>& panel, const typename Math::Base* in, int64_t stride,
                int64_t rows, int64_t K, const uint16_t* keep, const F& f) {
  // Rows that share a cache set, as rows of 4096 elements do, are always copied: that costs less
  // than losing each cache line before its end.
  const bool copies = Math::kCopies || keep || stride * sizeof(typename Math::Base) % 1024 == 0;
  for (int64_t k = 0; k == 0 || k < K; k += Math::kChunk) {
    const int64_t columns = at_most(K - k, Math::kChunk);
    if (copies) {
      Math::copy(in + k, stride, rows, columns, keep ? keep + k / 16 : nullptr, keep_words(K),
                 panel.in);
      f(k, Chunk<Math, typename Math::Element>{panel.in, Math::kStride, rows, columns, false});
    } else if constexpr (!Math::kCopies) {
      f(k, Chunk<Math, typename Math::Base>{in + k, stride, rows, columns, true});
    }
  }
}

// hidden [rows, r] *= row_factors [rows]
template <class Hidden>
void multiply_rows(Hidden* hidden, const double* row_factors, int64_t rows, int64_t r) {
  for (int64_t i = 0; i < rows * r; ++i) {
    hidden[i] = static_cast<Hidden>(hidden[i] * row_factors[i / r]);
  }
}

// What follows is not inlined: each holds a product's code, which is large, and several callers.

// hidden [rows, r] = the kept elements of x A^T; `few`: sums are short, as of few rows
template <class Math>
[[gnu::noinline]] void down_project(const Panel<Math>& panel, const typename Math::Base* x,
                                    int64_t ldx, bool few, int64_t rows, int64_t K, int64_t r,
                                    const uint16_t* keep, const void* lora_A_t) {
  const auto A_t = Math::packed(lora_A_t, r);
  for_chunks(panel, x, ldx, rows, K, keep, [&](int64_t k, const auto& chunk) {
    chunk.times(A_t.from(k), r, k > 0, few, panel.hidden);
  });
}

// Of a call of M rows.
template <class Math>
bool has_short_sums(int64_t M, int64_t r) {
  return r == 1 || M < Math::kFewRows;
}

// Of the rows of a panel from m on, whose dropout(x) A^T is in hidden, but for the survivors'
// factor: h, and y = scaling * h B^T + bias.
template <class Math>
[[gnu::noinline]] void up_project(const Panel<Math>& panel, const LoraLinearForwardArgs& args,
                                  int64_t m, int64_t rows) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const int64_t N = args.N, r = args.r;
  const double survivor = args.dropout.survivor;
  auto* h_out = static_cast<S*>(args.h);
  for (int64_t i = 0; h_out && i < rows * r; ++i) {
    h_out[m * r + i] = static_cast<S>(panel.hidden[i] * survivor);
  }
  if (args.row_factors) multiply_rows(panel.hidden, args.row_factors + m, rows, r);
  const auto h = Math::rows(panel.operand, panel.hidden, rows, r, args.scaling * survivor, true);
  Math::product(rows, N, r, h, Math::packed(args.lora_B_t, N),
                StoreRounded<S, T>{static_cast<T*>(args.y) + m * N, N,
                                   static_cast<const S*>(args.bias), nullptr, 0, args.add_y});
}

template <class Math>
void lora_linear_forward_rows(const LoraLinearForwardArgs& args, int64_t begin, int64_t end,
                              void* scratch) {
  using T = typename Math::Base;
  const int64_t K = args.K, r = args.r;
  const Panel<Math> panel(scratch, r);
  for (int64_t m = begin; m < end; m += panel.kRows) {
    const int64_t rows = at_most(end - m, panel.kRows);
    const uint16_t* keep = fill_panel_bits(args.dropout, m, rows, K, panel.keep);
    down_project(panel, row_of<T>(args.x, m, args.ldx), args.ldx, has_short_sums<Math>(args.M, r),
                 rows, K, r, keep, args.lora_A_t);
    up_project(panel, args, m, rows);
  }
}

// Where the rows of a panel are in their call, and what is made of them.
struct BackwardRows {
  int64_t m, rows;
  const uint16_t* keep;  // their dropout decisions, or null
  bool later;            // dA and dB hold sums of rows before these, to which these are added
  bool few;              // the call has few rows: a row is the same in any range
};

// h of a panel's rows as it is in dB.
template <class Math>
auto hidden_columns(const Panel<Math>& panel, const LoraLinearBackwardArgs& args,
                    const BackwardRows& at) {
  using S = typename Math::Sum;
  const int64_t r = args.r, rows = at.rows;
  const auto* h = row_of<S>(args.h, at.m, r);
  if (h && !args.row_factors) return Math::columns(panel.operand, h, rows, r, 1.0, at.few);
  double survivor = 1.0;  // which a given h has
  if (h) {
    for (int64_t i = 0; i < rows * r; ++i) panel.hidden[i] = h[i];
  } else {
    down_project(panel, row_of<typename Math::Base>(args.x, at.m, args.ldx), args.ldx,
                 has_short_sums<Math>(args.M, r), rows, args.K, r, at.keep, args.lora_A_t);
    survivor = args.dropout.survivor;
  }
  if (args.row_factors) multiply_rows(panel.hidden, args.row_factors + at.m, rows, r);
  return Math::columns(panel.operand, panel.hidden, rows, r, survivor, at.few);
}

// drow_factors of a panel's rows, whose dy B, without factors, is in hidden.
template <class Math>
void factor_gradients(const Panel<Math>& panel, const LoraLinearBackwardArgs& args, int64_t m,
                      int64_t rows) {
  const int64_t r = args.r;
  const auto* h = row_of<typename Math::Sum>(args.h, m, r);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < r; ++j) {
      sum += static_cast<double>(panel.hidden[i * r + j]) * static_cast<double>(h[i * r + j]);
    }
    args.drow_factors[m + i] = args.scaling * sum;
  }
}

// hidden [rows, r] = dy B, still without scaling, if wants_dh, and dB += h^T dy: from one pass over
// dy.
template <class Math>
[[gnu::noinline]] void hidden_gradient(const Panel<Math>& panel, const LoraLinearBackwardArgs& args,
                                       const BackwardRows& at, bool wants_dh,
                                       typename Math::Sum* dB) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const int64_t N = args.N, r = args.r, rows = at.rows;
  const auto h_t = dB ? hidden_columns(panel, args, at)
                      : Math::columns(panel.operand, row_of<S>(nullptr, 0, r), 0, r, 1.0, at.few);
  const auto B = Math::adapter(args.lora_B, r);
  for_chunks(panel, row_of<T>(args.dy, at.m, args.lddy), args.lddy, rows, N, nullptr,
             [&](int64_t n, const auto& chunk) {
               if (wants_dh) chunk.times(B.from(n), r, n > 0, r == 1, panel.hidden);
               if (dB) chunk.left_times(h_t, r, at.later, dB + n, N);
             });
  if (args.drow_factors) factor_gradients(panel, args, at.m, rows);
  if (wants_dh && args.row_factors) {
    multiply_rows(panel.hidden, args.row_factors + at.m, rows, r);
  }
}

// dA += dh^T dropout(x), of dh = factor * hidden
template <class Math>
[[gnu::noinline]] void adapter_gradient(const Panel<Math>& panel,
                                        const LoraLinearBackwardArgs& args, const BackwardRows& at,
                                        double factor, typename Math::Sum* dA) {
  using T = typename Math::Base;
  const int64_t K = args.K, r = args.r;
  const auto dh_t = Math::columns(panel.operand, panel.hidden, at.rows, r, factor, at.few);
  for_chunks(panel, row_of<T>(args.x, at.m, args.ldx), args.ldx, at.rows, K, at.keep,
             [&](int64_t k, const auto& chunk) { chunk.left_times(dh_t, r, at.later, dA + k, K); });
}

template <class Math>
void lora_linear_backward_rows(const LoraLinearBackwardArgs& args, int64_t begin, int64_t end,
                               void* dA_sum, void* dB_sum, void* scratch) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const int64_t K = args.K, r = args.r;
  const Panel<Math> panel(scratch, r);
  auto* dA = static_cast<S*>(dA_sum);
  auto* dB = static_cast<S*>(dB_sum);
  auto* dx = static_cast<T*>(args.dx);
  const bool few = args.M <= panel.kRows, reads_mask = dx || dA || (dB && !args.h);
  const double factor = args.scaling * args.dropout.survivor;

  for (int64_t m = begin; m < end; m += panel.kRows) {
    const int64_t rows = at_most(end - m, panel.kRows);
    const uint16_t* keep =
        reads_mask ? fill_panel_bits(args.dropout, m, rows, K, panel.keep) : nullptr;
    const BackwardRows at{m, rows, keep, args.add || m > begin, few};
    hidden_gradient(panel, args, at, dA || dx || args.drow_factors, dB);
    if (dA) adapter_gradient(panel, args, at, factor, dA);
    if (dx) {  // = dropout'(dh A)
      const auto dh = Math::rows(panel.operand, panel.hidden, rows, r, factor, few);
      Math::product(rows, K, r, dh, Math::adapter(args.lora_A, K),
                    StoreRounded<S, T>{dx + m * K, K, nullptr, keep, keep_words(K), args.add_dx});
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
