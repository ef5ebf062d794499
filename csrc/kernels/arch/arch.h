// The machine that kernels are written against. Under nvcc its instructions are PTX; a host
// compiler takes them from the emulator of the tests (simt/arch.h, on its include path), which
// gives the same names bodies that run on a CPU.
#pragma once

#include "../element.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ptx_sm80.h"
#include "ptx_sm90.h"

// The block's dynamic shared memory, as bytes, aligned for every instruction.
#define LORA_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace lora_ext::arch {

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lora_ext: a CUDA kernel was not launched: ") +
                             cudaGetErrorString(error));
  }
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Throws std::runtime_error if the kernel cannot be launched.
template <class Params>
inline void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Params& params) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  check(cudaGetLastError());
}

}  // namespace lora_ext::arch

#else
#include "simt/arch.h"
#endif
