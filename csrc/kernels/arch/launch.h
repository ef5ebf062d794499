// How kernels are launched, by CUDA's runtime: under the emulator by its own, with the limits of
// the GPU that a test chooses.
#pragma once

#include <stdexcept>
#include <string>

#include "wait_report.h"

namespace lora_ext::arch {

using Stream = cudaStream_t;

// Of the process: memory of the host that every GPU can write. Null if there is none.
inline WaitReport* wait_report() {
#if defined(__CUDACC__)
  static WaitReport* const report = [] {
    void* memory = nullptr;
    const auto flags = cudaHostAllocPortable | cudaHostAllocMapped;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // or a capture would be broken off
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaHostAlloc(&memory, sizeof(WaitReport), flags) != cudaSuccess) cudaGetLastError();
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (memory != nullptr) *static_cast<WaitReport*>(memory) = {};
    return static_cast<WaitReport*>(memory);
  }();
  return report;
#else
  return nullptr;  // the emulator tells of deadlocks itself
#endif
}

// The error is cleared before it is thrown: the next kernel that anyone launches must not be told
// of it.
inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const WaitReport* report = wait_report();
  throw std::runtime_error("lora_ext: " + what + ": " + cudaGetErrorString(error) +
                           (report != nullptr ? report->text() : ""));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current GPU is not known");
  check(cudaDeviceGetAttribute(&value, attribute, device), "the GPU does not tell what it has");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// That a block may have, where its kernel asks for them: 99 KiB to 227 KiB from sm_80 on.
inline int most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// How many clusters of so many blocks run at the same time: where the multiprocessors that a GPU
// has side by side are no multiple of that, some of them are in none. At least one.
template <class Params>
inline int clusters_at_once(void (*kernel)(Params), int threads, int shared_bytes, int blocks) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster, config.numAttrs = 1;
  int count = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  check(error, "the GPU does not tell how many clusters it runs");
  return count > 1 ? count : 1;
}

// Whether kernels of this build may overlap on the current device: there it has their code for
// sm_90, in which wait_for_previous_kernel waits. The emulator lets all of them.
inline bool kernels_overlap() {
#if !defined(__CUDACC__)
  return true;
#elif defined(LORA_EXT_SM90)
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#else
  return false;
#endif
}

template <class Params>
inline void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Params& params, bool overlap, unsigned cluster) {
  constexpr int kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
  config.attrs = attributes, config.numAttrs = count;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return;
  const auto number = [](auto value) { return std::to_string(value); };
  check(error, "a CUDA kernel was not launched, of " + number(grid.x) + " x " + number(grid.y) +
                   " x " + number(grid.z) + " blocks of " + number(threads) + " threads and " +
                   number(shared_bytes) + " bytes of shared memory");
}

// Throws std::runtime_error if the kernel cannot be launched.
template <class Params>
inline void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Params& params) {
  launch(kernel, grid, threads, shared_bytes, stream, params, false, 1);
}

// The same for a kernel whose threads all call wait_for_previous_kernel before they touch global
// memory: it may begin while the kernel before it in the stream, whichever that is, still runs.
// `cluster` blocks along x run at the same time; the grid has a multiple of them.
template <class Params>
inline void launch_dependent(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                             Stream stream, const Params& params, unsigned cluster = 1) {
  launch(kernel, grid, threads, shared_bytes, stream, params, kernels_overlap(), cluster);
}

}  // namespace lora_ext::arch
