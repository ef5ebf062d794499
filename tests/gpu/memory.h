// Memory of a GPU for programs without torch, and whether there is a GPU at all.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/lora_linear.h"

namespace gpu_test {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Why no program can run here, in one sentence; empty if it can.
inline std::string why_no_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  const std::string said = error == cudaSuccess ? "no device" : cudaGetErrorString(error);
  return "there is no NVIDIA GPU here that CUDA can use (" + said + ")";
}

// 90 for sm_90, of the first GPU.
inline int compute_capability() {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  return 10 * major + minor;
}

// Why the GPU runs no kernels of a family, "sm80" or "sm90"; empty if it does.
inline std::string why_not_here(const std::string& family) {
  const int capability = compute_capability();
  if (family == "sm90" ? capability == 90 : capability >= 80) return "";
  return "the GPU here is sm_" + std::to_string(capability) + ", which runs no kernels of " +
         family;
}

// Freed together, when the kernels that use them have run.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    cudaDeviceSynchronize();
    for (void* block : blocks_) cudaFree(block);
  }
  static void* allocate(void* context, int64_t bytes) {
    void* block = nullptr;
    check(cudaMalloc(&block, static_cast<size_t>(bytes > 0 ? bytes : 1)));
    static_cast<Memory*>(context)->blocks_.push_back(block);
    return block;
  }
  lora_ext::Allocator allocator() { return {allocate, this}; }

  template <class T>
  T* fresh(size_t count) {
    return static_cast<T*>(allocate(this, static_cast<int64_t>(count * sizeof(T))));
  }
  template <class T>
  T* copy(const std::vector<T>& values) {
    T* block = fresh<T>(values.size());
    check(cudaMemcpy(block, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return block;
  }

 private:
  std::vector<void*> blocks_;
};

}  // namespace gpu_test
