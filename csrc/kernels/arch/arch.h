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

template <class Params>
inline void allow_shared_bytes(void (*kernel)(Params), int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
}

// Throws std::runtime_error if the kernel cannot be launched.
template <class Params>
inline void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Params& params) {
  allow_shared_bytes(kernel, shared_bytes);
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  check(cudaGetLastError());
}

// Whether kernels of this build may overlap on the current device: there it has their code for
// sm_90, in which wait_for_previous_kernel waits.
inline bool kernels_overlap() {
#if defined(LORA_EXT_SM90)
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// The same for a kernel whose threads all call wait_for_previous_kernel before they touch global
// memory: it may begin while the kernel before it in the stream, whichever that is, still runs.
template <class Params>
inline void launch_dependent(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                             Stream stream, const Params& params) {
  if (!kernels_overlap()) return launch(kernel, grid, threads, shared_bytes, stream, params);
  allow_shared_bytes(kernel, shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace lora_ext::arch

#else
#include "simt/arch.h"
#endif
