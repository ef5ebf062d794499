// The low-rank parts of several layers that share x, on a range of rows: panel by panel, so that x
// comes from memory once for all. Without dropout their lora_A are one matrix, stacked, and one
// product makes every h.
#pragma once

#include "lora_linear_rows.h"

namespace lora_ext::LORA_EXT_ISA {

// A panel of the stacked ranks, and what several layers need beside it.
template <class Math>
struct MultiPanel : Panel<Math> {
  using Hidden = typename Math::Hidden;
  using Sum = typename Math::Sum;
  using Panel<Math>::kRows;

  Hidden* own_hidden;  // [kRows, r]: of one layer, out of the stacked ones
  Sum* sums;           // [kRows, Math::kChunk]: of dx
  Sum* term;           // the same of one layer, where there are masks
  uint16_t* masks;     // of each layer [kRows, keep_words(K)]

  MultiPanel(void* scratch, int64_t K, int64_t R) : Panel<Math>(scratch, R) {
    own_hidden = reinterpret_cast<Hidden*>(static_cast<char*>(scratch) + Panel<Math>::bytes(K, R));
    sums = reinterpret_cast<Sum*>(own_hidden + kRows * R);
    term = sums + kRows * Math::kChunk;
    masks = reinterpret_cast<uint16_t*>(term + kRows * Math::kChunk);
  }

  uint16_t* mask_of(int64_t layer, int64_t K) const {
    return masks + layer * kRows * keep_words(K);
  }

  // Of one layer, whose h or dh is at `hidden`.
  Panel<Math> of_layer(Hidden* hidden) const {
    Panel<Math> panel = *this;
    panel.hidden = hidden;
    return panel;
  }
};

// For so many layers with dropout.
template <class Math>
int64_t multi_bytes(int64_t K, int64_t R, int64_t masks) {
  constexpr int64_t kRows = Panel<Math>::kRows;
  const int64_t of_sums = kRows * Math::kChunk * static_cast<int64_t>(sizeof(typename Math::Sum));
  return Panel<Math>::bytes(K, R) +
         kRows * R * static_cast<int64_t>(sizeof(typename Math::Hidden)) + of_sums +
         (masks > 0 ? of_sums + masks * kRows * 2 * keep_words(K) : 0);
}

template <class Math>
void lora_linear_multi_forward_rows(const LoraLinearMultiForwardArgs& args, int64_t begin,
                                    int64_t end, void* scratch) {
  using T = typename Math::Base;
  const LoraLinearForwardArgs& first = args.layers[0];
  const int64_t M = first.M, K = first.K, R = args.R;
  const MultiPanel<Math> panel(scratch, K, R);
  bool few = false;
  for (int64_t i = 0; i < args.count; ++i) {
    few = few || has_short_sums<Math>(M, args.layers[i].r);
  }
  for (int64_t m = begin; m < end; m += panel.kRows) {
    const int64_t rows = at_most(end - m, panel.kRows);
    if (!args.lora_A_t) {  // a mask for each: x is in cache from the second one on
      for (int64_t i = 0; i < args.count; ++i) {
        lora_linear_forward_rows<Math>(args.layers[i], m, m + rows, scratch);
      }
      continue;
    }
    down_project<Math>(panel, row_of<T>(first.x, m, first.ldx), first.ldx, few, rows, K, R, nullptr,
                       args.lora_A_t);
    int64_t rank = 0;
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t r = args.layers[i].r;
      for (int64_t row = 0; row < rows; ++row) {
        const auto* h = panel.hidden + row * R + rank;
        for (int64_t j = 0; j < r; ++j) panel.own_hidden[row * r + j] = h[j];
      }
      up_project(panel.of_layer(panel.own_hidden), args.layers[i], m, rows);
      rank += r;
    }
  }
}

// sums [rows, columns] = term where kept, else 0; or += it. Whole vectors: rows are stride apart.
template <class S>
void take_kept(const S* term, int64_t stride, int64_t rows, int64_t columns, const uint16_t* keep,
               int64_t keep_stride, bool add, S* sums) {
  using V = Vec<S>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      S* sum = sums + i * stride + j;
      auto kept = V::keep(V::load(term + i * stride + j), bits_at(keep + i * keep_stride, j));
      if (add) kept = V::add(kept, V::load(sum));
      V::store(sum, kept);
    }
  }
}

// out [rows, columns] += sums, rounded once
template <class S, class T>
void add_rounded(const S* sums, int64_t stride, int64_t rows, int64_t columns, T* out,
                 int64_t out_stride) {
  using V = Vec<S>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      const int lanes = static_cast<int>(at_most(columns - j, V::kWidth));
      T* p = out + i * out_stride + j;
      store_lanes<S>(p, V::add(V::load(sums + i * stride + j), load_lanes<S>(p, lanes)), lanes);
    }
  }
}

// A term of dx, dropout'(dh A) of one layer. Each is a sum of its own: its terms in a row are no
// more than in a call of its own.
template <class Math>
struct Term {
  const typename Math::Hidden* dh;  // [rows, r], without factor
  int64_t r;
  const void* lora_A;  // [r, K]
  double factor;
  const uint16_t* keep;
};

// Columns [k, k + columns) of panel.sums = the term, or += it; in tiles that other products have,
// too, which keeps the code small.
template <class Math>
void sum_up(const MultiPanel<Math>& panel, const Term<Math>& term, const BackwardRows& at,
            int64_t K, int64_t k, int64_t columns, bool add) {
  using S = typename Math::Sum;
  const auto dh = Math::rows(panel.operand, term.dh, at.rows, term.r, term.factor, at.few);
  auto A = Math::wide_adapter(term.lora_A, K);
  A.data += k;
  S* out = term.keep ? panel.term : panel.sums;
  Math::sum_of_rows(at.rows, columns, term.r, dh, A,
                    StoreSum<S>{out, Math::kChunk, add && !term.keep});
  if (term.keep) {
    take_kept<S>(panel.term, Math::kChunk, at.rows, columns, term.keep + k / 16, keep_words(K), add,
                 panel.sums);
  }
}

template <class Math>
void lora_linear_multi_backward_rows(const LoraLinearMultiBackwardArgs& args, int64_t begin,
                                     int64_t end, void* const* dA_sums, void* const* dB_sums,
                                     void* scratch) {
  using T = typename Math::Base;
  using S = typename Math::Sum;
  const LoraLinearBackwardArgs& first = args.layers[0];
  const int64_t K = first.K;
  const MultiPanel<Math> panel(scratch, K, args.R);
  bool drops = false, wants_dA = false;
  for (int64_t i = 0; i < args.count; ++i) {
    drops = drops || args.layers[i].dropout.enabled;
    wants_dA = wants_dA || dA_sums[i];
  }
  for (int64_t m = begin; m < end; m += panel.kRows) {
    BackwardRows at{m, at_most(end - m, panel.kRows), nullptr, m > begin, first.M <= panel.kRows};
    // f(i, layer, dh without factor, factor)
    const auto for_layers = [&](const auto& f) {
      int64_t rank = 0;
      for (int64_t i = 0; i < args.count; ++i) {
        const LoraLinearBackwardArgs& layer = args.layers[i];
        at.keep = layer.dropout.enabled ? panel.mask_of(i, K) : nullptr;
        f(i, layer, panel.hidden + panel.kRows * rank, layer.scaling * layer.dropout.survivor);
        rank += layer.r;
      }
    };

    // Every dh, and dB
    for_layers([&](int64_t i, const auto& layer, auto* dh, double) {
      if (layer.dropout.enabled) {
        fill_panel_bits(layer.dropout, m, at.rows, K, panel.mask_of(i, K));
      }
      hidden_gradient(panel.of_layer(dh), layer, at, args.dx || dA_sums[i],
                      static_cast<S*>(dB_sums[i]));
    });

    // Every dA: of chunks of x that are in cache for all, or with a mask for each copied again
    if (drops) {
      for_layers([&](int64_t i, const auto& layer, auto* dh, double factor) {
        if (!dA_sums[i]) return;
        adapter_gradient(panel.of_layer(dh), layer, at, factor, static_cast<S*>(dA_sums[i]));
      });
    } else if (wants_dA) {
      for_chunks(panel, row_of<T>(first.x, m, first.ldx), first.ldx, at.rows, K, nullptr,
                 [&](int64_t k, const auto& chunk) {
                   for_layers([&](int64_t i, const auto& layer, auto* dh, double factor) {
                     if (!dA_sums[i]) return;
                     const auto dh_t =
                         Math::columns(panel.operand, dh, at.rows, layer.r, factor, at.few);
                     chunk.left_times(dh_t, layer.r, at.later, static_cast<S*>(dA_sums[i]) + k, K);
                   });
                 });
    }

    // dx += the sum of all terms, rounded once
    for (int64_t k = 0; args.dx && k < K; k += Math::kChunk) {
      const int64_t columns = at_most(K - k, Math::kChunk);
      for_layers([&](int64_t i, const auto& layer, auto* dh, double factor) {
        sum_up<Math>(panel, {dh, layer.r, layer.lora_A, factor, at.keep}, at, K, k, columns, i > 0);
      });
      add_rounded<S, T>(panel.sums, Math::kChunk, at.rows, columns,
                        static_cast<T*>(args.dx) + m * K + k, K);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
