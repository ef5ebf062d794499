// What column_scale on the CPU lends to other operators.
#pragma once

#include <ATen/ATen.h>

#include "cpu/column_scale_kernels.h"

namespace lora_ext {

// All M rows, in parallel.
void column_scale_rows(at::ScalarType base, const ColumnScaleArgs& args, int64_t M);

}  // namespace lora_ext
