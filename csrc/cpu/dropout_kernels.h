// The vector kernels of dropout and its mask, and what kernels are told that drop elements of x.
#pragma once

#include <cstdint>

#include "../common/dropout.h"

namespace lora_ext {

// Without dropout the threshold keeps everything, every survivor is multiplied by 1, and nobody
// need look.
struct DropoutArgs {
  bool enabled;
  uint32_t threshold;
  double survivor;
  DropoutRng rng;
  const int32_t* rows = nullptr;  // of the mask, for each row of x; null where they are the same
};

struct DropoutKernels {
  // Rows [begin, end) of out [M, K] = dropout(x), rows of x ldx apart; out may be x. Row 0 is row
  // first_row of the mask.
  void (*rows)(const void* x, int64_t ldx, int64_t K, const DropoutArgs& dropout, int64_t first_row,
               int64_t begin, int64_t end, void* out);
  // Rows [begin, end) of the mask, one byte for each column, to keep [end - begin, columns].
  void (*mask_rows)(DropoutRng rng, uint32_t threshold, int64_t columns, int64_t begin, int64_t end,
                    uint8_t* keep);
};

}  // namespace lora_ext
