// How kernels are launched, by CUDA's runtime: under the emulator by its own, with the limits of
// the GPU that a test chooses.
#pragma once

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "wait_report.h"

namespace lora_ext::arch {

using Stream = cudaStream_t;

// Of the process: memory of the host that every GPU can write, a report for each kernel that may
// leave one. Null if there is none.
inline WaitReport* wait_reports() {
#if defined(__CUDACC__)
  static WaitReport* const reports = [] {
    constexpr size_t kBytes = kWaitingKernels * sizeof(WaitReport);
    void* memory = nullptr;
    const auto flags = cudaHostAllocPortable | cudaHostAllocMapped;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // or a capture would be broken off
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaHostAlloc(&memory, kBytes, flags) != cudaSuccess) cudaGetLastError();
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (memory != nullptr) memset(memory, 0, kBytes);
    return static_cast<WaitReport*>(memory);
  }();
  return reports;
#else
  return nullptr;  // the emulator tells of deadlocks itself
#endif
}
inline WaitReport* wait_report(WaitingKernel kernel) {
  WaitReport* const reports = wait_reports();
  return reports == nullptr ? nullptr : reports + static_cast<int>(kernel);
}
inline std::string reported_waits() {
  std::string text;
  for (int i = 0; wait_reports() != nullptr && i < kWaitingKernels; ++i) {
    text += wait_reports()[i].text(static_cast<WaitingKernel>(i));
  }
  return text;
}

// The error is cleared before it is thrown: the next kernel that anyone launches must not be told
// of it.
inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("lora_ext: " + what + ": " + cudaGetErrorString(error) +
                           reported_waits());
}

// What is asked of the runtime about a GPU, once per thread: its answers do not change.
struct DeviceFacts {
  int multiprocessors = 0;
  int most_shared_bytes = 0;  // that a block may have, where its kernel asks: 99 KiB to 227 KiB
  bool kernels_overlap = false;
};

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current GPU is not known");
  return device;
}

inline DeviceFacts ask_device(int device) {
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "the GPU does not tell what it has");
    return value;
  };
  DeviceFacts facts{ask(cudaDevAttrMultiProcessorCount),
                    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), false};
#if !defined(__CUDACC__)
  facts.kernels_overlap = true;
#elif defined(LORA_EXT_SM90)
  facts.kernels_overlap =
      ask(cudaDevAttrComputeCapabilityMajor) == 9 && ask(cudaDevAttrComputeCapabilityMinor) == 0;
#endif
  return facts;
}

inline const DeviceFacts& facts_of(int device) {
  static thread_local std::map<int, DeviceFacts> known;
  const auto found = known.find(device);
  return found != known.end() ? found->second
                              : known.emplace(device, ask_device(device)).first->second;
}

// Of the current device.
inline int multiprocessors() { return facts_of(current_device()).multiprocessors; }
inline int most_shared_bytes() { return facts_of(current_device()).most_shared_bytes; }
// Whether kernels of this build may overlap: where the GPU has their code for sm_90, in which
// wait_for_previous_kernel waits. The emulator lets all of them.
inline bool kernels_overlap() { return facts_of(current_device()).kernels_overlap; }

// Lets a kernel have so much shared memory on the current device: asked for where it is more than
// before, of all threads.
inline cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard lock(mutex);
  int& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return cudaSuccess;
  const auto error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

// How many clusters of so many blocks run at the same time on the current device: where the
// multiprocessors that it has side by side are no multiple of that, some of them are in none. At
// least one.
template <class Params>
inline int clusters_at_once(void (*kernel)(Params), int threads, int shared_bytes, int blocks) {
  using Question = std::tuple<const void*, int, int, int, int>;
  static thread_local std::map<Question, int> answers;
  const auto* const address = reinterpret_cast<const void*>(kernel);
  int& answer = answers[{address, current_device(), threads, shared_bytes, blocks}];
  if (answer > 0) return answer;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster, config.numAttrs = 1;
  int count = 0;
  cudaError_t error = allow_shared_bytes(address, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  check(error, "the GPU does not tell how many clusters it runs");
  return answer = count > 1 ? count : 1;
}

template <class Params>
inline void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Params& params, bool overlap, unsigned cluster) {
  cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
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
