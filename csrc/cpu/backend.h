// What the CPU operators share: dtypes as table columns, the state of dropout, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "cpu/kernels.h"
#include "ops/tensors.h"

namespace lora_ext {

// The column of a table of kernels.
inline int dtype_pair(at::ScalarType base, at::ScalarType adapter) {
  const auto pair = [&] {
    if (base == at::kDouble) return DtypePair::F64;
    if (base == at::kFloat) return DtypePair::F32;
    if (base == at::kBFloat16) {
      return adapter == at::kFloat ? DtypePair::BF16_F32 : DtypePair::BF16;
    }
    return adapter == at::kFloat ? DtypePair::F16_F32 : DtypePair::F16;
  }();
  return static_cast<int>(pair);
}

inline DropoutArgs dropout_args(double dropout_p, const OptionalTensor& rng_state) {
  if (dropout_p == 0.0) return {false, dropout_threshold(0.0), 1.0, {}};
  const Tensor state = rng_state->contiguous();
  const int64_t* words = state.const_data_ptr<int64_t>();
  return {true,
          dropout_threshold(dropout_p),
          dropout_scale(dropout_p),
          {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])}};
}

// Cuts [0, items) into `parts` ranges, f(part, begin, end). The cut does not depend on which thread
// runs a part, so sums that are kept per part and added in order are reproducible.
template <class F>
void parallel_parts(int64_t items, int64_t parts, const F& f) {
  const int64_t size = parts > 0 ? at::divup(items, parts) : 0;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = std::min(items, part * size);
      f(part, begin, std::min(items, begin + size));
    }
  });
}

}  // namespace lora_ext
