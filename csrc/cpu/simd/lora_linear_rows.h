// lora_linear on a range of rows: everything but the base product, which the caller's BLAS adds to
// y and dx afterwards (beta = 1), so that each result is rounded to its storage type once.
#pragma once

#include "../kernels.h"
#include "gemm.h"
#include "panel.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

// Terms of dh that one accumulator sums in sequence.
constexpr int64_t kSumBlock = 128;

template <class T, class S>
struct WidenedRows {
  const T* data;  // rows stride apart
  int64_t stride;
  const uint16_t* keep;  // bits of row 0, or null
  int64_t keep_stride;
  S scale;

  // panel[rows, kPanelStride] = columns [column, column + columns), dropped out
  void chunk(int64_t rows, int64_t column, int64_t columns, S* panel) const {
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t* bits = keep ? keep + i * keep_stride + column / 16 : nullptr;
      widen_row(data + i * stride + column, columns, bits, scale, panel + i * kPanelStride);
    }
  }
};

inline void fill_panel_bits(const DropoutArgs& dropout, int64_t first_row, int64_t rows, int64_t K,
                            uint16_t* keep) {
  for (int64_t i = 0; i < rows; ++i) {
    fill_keep_bits(dropout.rng, first_row + i, K, dropout.threshold, keep + i * keep_words(K));
  }
}

// h[rows, r] = x A^T, chunk by chunk through `panel`
template <class S, class T, class TA>
void down_project(const WidenedRows<T, S>& x, const TA* lora_A, int64_t rows, int64_t K, int64_t r,
                  S* panel, S* h) {
  if (K == 0) {
    for (int64_t i = 0; i < rows * r; ++i) h[i] = S{0};
  }
  for (int64_t k = 0; k < K; k += kChunkColumns) {
    const int64_t columns = at_most(K - k, kChunkColumns);
    x.chunk(rows, k, columns, panel);
    gemm_nt(rows, r, columns, panel, kPanelStride, lora_A + k, K, h, r, k > 0);
  }
}

template <class T, class TA>
void forward_rows(const ForwardArgs& args, int64_t begin, int64_t end, void* scratch) {
  using S = compute_t<T>;
  const int64_t K = args.K, N = args.N, r = args.r;
  const Panel<S> panel(scratch, r);
  const auto* lora_A = static_cast<const TA*>(args.lora_A);
  const auto* lora_B = static_cast<const TA*>(args.lora_B);
  const auto* lora_B_t = static_cast<const S*>(args.lora_B_t);
  const auto* bias = static_cast<const S*>(args.bias);

  for (int64_t m = begin; m < end; m += kPanelRows) {
    const int64_t rows = at_most(end - m, kPanelRows);

    // h = dropout(x) A^T
    uint16_t* keep = nullptr;
    if (args.dropout.enabled) {
      keep = panel.keep;
      fill_panel_bits(args.dropout, m, rows, K, keep);
    }
    const WidenedRows<T, S> x{static_cast<const T*>(args.x) + m * args.ldx, args.ldx, keep,
                              keep_words(K), static_cast<S>(args.dropout.scale)};
    down_project(x, lora_A, rows, K, r, panel.in, panel.h);
    if (args.h) std::memcpy(static_cast<S*>(args.h) + m * r, panel.h, rows * r * sizeof(S));
    for (int64_t i = 0; i < rows * r; ++i) panel.h[i] *= static_cast<S>(args.scaling);

    // y = h B^T + bias
    for (int64_t n = 0; n < N; n += kChunkColumns) {
      const int64_t columns = at_most(N - n, kChunkColumns);
      if (lora_B_t) {
        gemm_nn(rows, columns, r, panel.h, r, int64_t{1}, lora_B_t + n, N, panel.out, kPanelStride,
                false);
      } else {
        gemm_nt(rows, columns, r, panel.h, r, lora_B + n * r, r, panel.out, kPanelStride, false);
      }
      for (int64_t i = 0; i < rows; ++i) {
        narrow_row(panel.out + i * kPanelStride, columns, bias ? bias + n : nullptr, nullptr, S{1},
                   static_cast<T*>(args.y) + (m + i) * N + n);
      }
    }
  }
}

template <class T, class TA>
void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end, void* dA_sum, void* dB_sum,
                   void* scratch) {
  using S = compute_t<T>;
  const int64_t K = args.K, N = args.N, r = args.r;
  const Panel<S> panel(scratch, r);
  const auto* lora_A = static_cast<const TA*>(args.lora_A);
  const auto* lora_B = static_cast<const TA*>(args.lora_B);
  auto* dA = static_cast<S*>(dA_sum);
  auto* dB = static_cast<S*>(dB_sum);
  auto* dx = static_cast<T*>(args.dx);
  const bool recompute_h = dB && !args.h;

  for (int64_t m = begin; m < end; m += kPanelRows) {
    const int64_t rows = at_most(end - m, kPanelRows);
    const bool later = m > begin;  // the first panel starts the sums, later ones add to them

    uint16_t* keep = nullptr;
    if (args.dropout.enabled && (dA || dx || recompute_h)) {
      keep = panel.keep;
      fill_panel_bits(args.dropout, m, rows, K, keep);
    }
    const WidenedRows<T, S> x{static_cast<const T*>(args.x) + m * args.ldx, args.ldx, keep,
                              keep_words(K), static_cast<S>(args.dropout.scale)};
    const WidenedRows<T, S> dy{static_cast<const T*>(args.dy) + m * args.lddy, args.lddy, nullptr,
                               0, S{1}};

    // h, saved or made again
    const S* h = panel.h;
    if (recompute_h) {
      down_project(x, lora_A, rows, K, r, panel.out, panel.h);
    } else if (dB) {
      h = static_cast<const S*>(args.h) + m * r;
    }

    // dh = scaling * dy B and dB += dy^T h from one pass over dy
    for (int64_t n = 0; n < N; n += kChunkColumns) {
      const int64_t columns = at_most(N - n, kChunkColumns);
      dy.chunk(rows, n, columns, panel.in);
      if (dA || dx) {
        for (int64_t k = 0; k < columns; k += kSumBlock) {
          gemm_nn(rows, r, at_most(columns - k, kSumBlock), panel.in + k, kPanelStride, int64_t{1},
                  lora_B + (n + k) * r, r, panel.dh, r, n + k > 0);
        }
      }
      if (dB) {
        gemm_nn(columns, r, rows, panel.in, int64_t{1}, kPanelStride, h, r, dB + n * r, r,
                later);
      }
    }
    for (int64_t i = 0; (dA || dx) && i < rows * r; ++i) {
      panel.dh[i] = N > 0 ? panel.dh[i] * static_cast<S>(args.scaling) : S{0};
    }

    // dA += dh^T dropout(x) and dx = dropout'(dh A)
    for (int64_t k = 0; k < K; k += kChunkColumns) {
      const int64_t columns = at_most(K - k, kChunkColumns);
      if (dA) {
        const bool widened = recompute_h && K <= kChunkColumns;  // still there from h
        S* const x_panel = widened ? panel.out : panel.in;
        if (!widened) x.chunk(rows, k, columns, x_panel);
        gemm_nn(r, columns, rows, panel.dh, int64_t{1}, r, x_panel, kPanelStride, dA + k, K, later);
      }
      if (dx) {
        gemm_nn(rows, columns, r, panel.dh, r, int64_t{1}, lora_A + k, K, panel.out, kPanelStride,
                false);
        for (int64_t i = 0; i < rows; ++i) {
          const uint16_t* bits = keep ? keep + i * keep_words(K) + k / 16 : nullptr;
          narrow_row(panel.out + i * kPanelStride, columns, static_cast<const S*>(nullptr), bits,
                     static_cast<S>(args.dropout.scale), dx + (m + i) * K + k);
        }
      }
    }
  }
}

template <class T>
int64_t transposed_bytes(int64_t rows, int64_t columns) {
  return rows * columns * static_cast<int64_t>(sizeof(compute_t<T>));
}

template <class T, class TA>
void transpose(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
               void* out) {
  using S = compute_t<T>;
  constexpr int kWidth = Vec<S>::kWidth;
  const auto* data = static_cast<const TA*>(in);
  auto* result = static_cast<S*>(out);
  for (int64_t n = begin; n < end; n += kWidth) {
    const int height = static_cast<int>(at_most(end - n, kWidth));
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int lanes = static_cast<int>(at_most(columns - j, kWidth));
      S block[kWidth][kWidth];
      for (int i = 0; i < height; ++i) {
        Vec<S>::store(block[i], Vec<S>::load_partial(data + (n + i) * columns + j, lanes));
      }
      for (int l = 0; l < lanes; ++l) {
        for (int i = 0; i < height; ++i) result[(j + l) * rows + n + i] = block[i][l];
      }
    }
  }
}

template <class T, class TA>
bool merge_rows(void* weight, int64_t ldw, const void* lora_A, const void* lora_B, int64_t K,
                int64_t r, double scaling, int64_t begin, int64_t end, bool store, void* scratch) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const Panel<S> panel(scratch, r);
  bool finite = true;
  for (int64_t n = begin; n < end; n += kPanelRows) {
    const int64_t rows = at_most(end - n, kPanelRows);
    widen_row(static_cast<const TA*>(lora_B) + n * r, rows * r, nullptr, S{1}, panel.h);
    for (int64_t i = 0; i < rows * r; ++i) panel.h[i] *= static_cast<S>(scaling);
    for (int64_t k = 0; k < K; k += kChunkColumns) {
      const int64_t columns = at_most(K - k, kChunkColumns);
      gemm_nn(rows, columns, r, panel.h, r, int64_t{1}, static_cast<const TA*>(lora_A) + k, K,
              panel.out, kPanelStride, false);
      for (int64_t i = 0; i < rows; ++i) {
        T* row = static_cast<T*>(weight) + (n + i) * ldw + k;
        const S* delta = panel.out + i * kPanelStride;
        for (int64_t j = 0; j < columns; j += V::kWidth) {
          const int lanes = static_cast<int>(at_most(columns - j, V::kWidth));
          const auto sum =
              V::add(V::load_partial(row + j, lanes), V::load_partial(delta + j, lanes));
          T rounded[V::kWidth];
          V::store(rounded, sum);  // an overflow of the storage type shows only after rounding
          finite &= V::all_finite(V::load_partial(rounded, lanes));
          if (store) V::store_partial(row + j, sum, lanes);
        }
      }
    }
  }
  return finite;
}

}  // namespace lora_ext::LORA_EXT_ISA
