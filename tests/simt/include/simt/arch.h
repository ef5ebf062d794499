// The machine of csrc/kernels/arch/arch.h on a CPU: what a host compiler sees of it.
#pragma once

#include "simt/builtins.h"
#include "simt/launch.h"
#include "simt/sm80.h"
#include "simt/sm90.h"

#define LORA_EXT_DYNAMIC_SHARED(name) uint8_t* const name = ::simt::block().shared.data()

namespace lora_ext::arch {

using Stream = void*;

inline int multiprocessors() { return simt::options().multiprocessors; }

// Returns 0, as cudaSuccess is. What a kernel does wrong is thrown as simt::Error.
template <class Params>
inline int launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream,
                  const Params& params) {
  simt::run_grid(grid, threads, shared_bytes, false, [&] { kernel(params); });
  return 0;
}

// Every thread has to wait before it copies anything, and before it ends.
template <class Params>
inline int launch_dependent(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                            Stream, const Params& params) {
  simt::run_grid(grid, threads, shared_bytes, true, [&] { kernel(params); });
  return 0;
}

}  // namespace lora_ext::arch
