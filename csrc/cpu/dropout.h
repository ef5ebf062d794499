// Dropout by its mask, for operators that are made of several.
#pragma once

#include "ops/tensors.h"

namespace lora_ext {

// out [rows, K] = x where the mask keeps, from its row first_row on, else 0; what is kept is not
// multiplied. x has rows of adjacent elements, out, which may be x, is contiguous.
void keep_rows_cpu(const Tensor& out, const Tensor& x, const Tensor& rng_state, double dropout_p,
                   int64_t first_row);

}  // namespace lora_ext
