// merge_ on a range of rows.
#pragma once

#include "float_math.h"
#include "store.h"

namespace lora_ext::LORA_EXT_ISA {

constexpr int64_t kMergeRows = 48;

// Scratch of merge_rows: scaling * B of one panel of rows.
template <class S>
int64_t merge_bytes(int64_t r) {
  return kMergeRows * r * static_cast<int64_t>(sizeof(S));
}

// Rows [begin, end) of weight [N, K] = weight * factor + scaling * B A; whether all are finite.
template <class T, class TA>
bool merge_rows(void* weight, int64_t ldw, const void* row_factor, const void* column_factor,
                const void* lora_A, const void* lora_B, int64_t K, int64_t r, double scaling,
                int64_t begin, int64_t end, bool store, void* scratch) {
  using S = compute_t<T>;
  auto* scaled = static_cast<S*>(scratch);
  bool finite = true;
  for (int64_t n = begin; n < end; n += kMergeRows) {
    const int64_t rows = at_most(end - n, kMergeRows);
    copy_kept(static_cast<const TA*>(lora_B) + n * r, r, rows, r, nullptr, 0, scaled, r);
    for (int64_t i = 0; i < rows * r; ++i) scaled[i] *= static_cast<S>(scaling);
    gemm(rows, K, r, LeftRows<S>{scaled, r, 1}, RightRows<TA>{static_cast<const TA*>(lora_A), K},
         StoreMerged<S, T>{static_cast<T*>(weight) + n * ldw, ldw,
                           row_factor ? static_cast<const S*>(row_factor) + n : nullptr,
                           static_cast<const S*>(column_factor), store, &finite});
  }
  return finite;
}

}  // namespace lora_ext::LORA_EXT_ISA
