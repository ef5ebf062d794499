// The machine that kernels are written against. Under nvcc its instructions are PTX; a host
// compiler takes them from the emulator of the tests (simt/arch.h, on its include path), which
// gives the same names bodies that run on a CPU.
#pragma once

#include "../element.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include "ptx_sm80.h"
#include "ptx_sm90.h"

// The block's dynamic shared memory, as bytes, aligned for every instruction.
#define LORA_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace lora_ext::arch {

using Stream = cudaStream_t;

// Returns cudaSuccess, or why the kernel was not launched.
template <class Params>
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                          Stream stream, const Params& params) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace lora_ext::arch

#else
#include "simt/arch.h"
#endif
