// Which kernels run a call, for those who choose: nothing of the kernels themselves.
#pragma once

#include <cstdint>

namespace lora_ext {

// For GPUs from sm_80 on; and with TMA and wgmma for sm_90a, which read what Rows::Tma of
// cuda/lora_linear_path.h says.
enum class KernelFamily { Sm80, Sm90 };

// Whether a forward with the base product is one kernel's (few_rows_sm80.h), if its matrices lie so
// that it can read them. `mixed`: float adapters. Each block reads all of x and lora_A: they should
// not be much more than its own rows of the weight, which are 8 to 32.
constexpr bool few_rows_fit(int64_t M, int64_t r, bool mixed, bool dropout) {
  constexpr int64_t kMostRows = 16, kMostRank = 32, kMostRead = 40;
  return M <= kMostRows && r <= kMostRank && M + (mixed ? 2 : 1) * r <= kMostRead && !dropout;
}

}  // namespace lora_ext
