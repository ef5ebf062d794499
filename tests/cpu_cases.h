// For tests/cpu_kernels.cpp: sizes, dropout, packed adapters, and calls in two ranges of rows.
#pragma once

#include "cpu/dropout_kernels.h"
#include "cpu/lora_linear_kernels.h"
#include "cpu_values.h"

namespace {

using namespace lora_ext;

struct Size {
  int64_t M, N, K, r;
};

DropoutArgs dropout_of(bool enabled) {
  return enabled ? DropoutArgs{true, dropout_threshold(0.5), dropout_scale(0.5), {7, 9}}
                 : DropoutArgs{false, dropout_threshold(0.0), 1.0, {}};
}

Buffer pack(const LoraLinearKernels& kernels, const Buffer& adapter, int64_t rows,
            int64_t columns) {
  Buffer packed(1, kernels.packed_bytes(rows, columns));
  kernels.pack(adapter.data(), rows, columns, 0, rows / 2, packed.data());
  kernels.pack(adapter.data(), rows, columns, rows / 2, rows, packed.data());
  return packed;
}

// f(begin, end) for two ranges of rows, as two threads have them.
template <class F>
void in_two(int64_t rows, const F& f) {
  f(0, 0, rows / 3);
  f(1, rows / 3, rows);
}

}  // namespace
