// Which kernels run a call, for those who choose: nothing of the kernels themselves.
#pragma once

#include <cstdint>

#include "switches.h"

namespace lora_ext {

// For GPUs from sm_80 on; and with TMA and wgmma for sm_90a, which read what Rows::Tma of
// cuda/lora_linear_path.h says.
enum class KernelFamily { Sm80, Sm90 };

// Of the kernel of few rows, a family's: of sm_90a blocks share x in clusters, and without clusters
// they do what sm_80's do.
inline KernelFamily few_rows_family(KernelFamily family) {
  return switched_off(Mechanism::kCluster) ? KernelFamily::Sm80 : family;
}

// Whether a forward with the base product is one kernel's (few_rows_sm80.h), if its matrices lie so
// that it can read them. `mixed`: float adapters. Each block reads x and lora_A, on sm_90a a
// quarter of them: they should not be much more than its own rows of the weight. By prediction the
// bounds are where cuBLAS's three products, or on sm_90a the product's own kernel, begin to be as
// fast; where few columns leave multiprocessors idle that is earlier.
constexpr bool few_rows_fit(int64_t M, int64_t N, int64_t r, bool mixed, bool dropout,
                            KernelFamily family) {
  constexpr int64_t kMostRows = 64, kFewColumns = 2048;
  const bool shared = family == KernelFamily::Sm90;
  const int64_t most_rank = shared ? 128 : 64;
  const int64_t most_read = shared ? 144 : N < kFewColumns ? 80 : 96;
  return M <= kMostRows && r <= most_rank && M + (mixed ? 2 : 1) * r <= most_read && !dropout;
}

}  // namespace lora_ext
