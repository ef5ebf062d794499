// Kernels of one thread an element, for any architecture: how they begin and are launched; and the
// whole numbers of their grids.
#pragma once

#include "arch/arch.h"
#include "stream.h"

namespace lora_ext {

constexpr int kElementThreads = 256;

// This thread's element, once the kernel before is over: launch_elements lets them overlap.
LORA_EXT_DEVICE int64_t element_index() {
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  return int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
}

constexpr int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }
constexpr int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Params>
void launch_elements(void (*kernel)(Params), int64_t elements, Stream stream, const Params& params,
                     int shared_bytes = 0) {
  const auto blocks = static_cast<unsigned>(ceil_div(elements, kElementThreads));
  arch::launch_dependent(kernel, dim3(blocks), kElementThreads, shared_bytes, stream, params);
}

}  // namespace lora_ext
