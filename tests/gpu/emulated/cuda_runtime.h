// CUDA's runtime for the programs of this folder and of benchmarks/kernels where there is no GPU:
// what tests/simt emulates for kernels and their launches, and host memory and clocks for the rest.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "simt/arch.h"

enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { CUDA_R_16BF = 14 };

constexpr auto cudaDevAttrComputeCapabilityMajor = static_cast<cudaDeviceAttr>(75);
constexpr auto cudaDevAttrComputeCapabilityMinor = static_cast<cudaDeviceAttr>(76);
constexpr auto cudaDevAttrL2CacheSize = static_cast<cudaDeviceAttr>(38);

inline cudaError_t emulated_attribute(int* value, cudaDeviceAttr attribute, int device) {
  const int capability = simt::options().compute_capability;
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = capability / 10, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMinor) return *value = capability % 10, cudaSuccess;
  if (attribute == cudaDevAttrL2CacheSize) return *value = 1 << 10, cudaSuccess;
  return cudaDeviceGetAttribute(value, attribute, device);
}
#define cudaDeviceGetAttribute emulated_attribute

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
struct cudaDeviceProp {
  char name[256];
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "emulated");
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char*, int, int) { return cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

template <class T>
cudaError_t cudaMalloc(T** block, size_t bytes) {
  void* address = nullptr;  // of exactly so many bytes, for AddressSanitizer
  if (posix_memalign(&address, 256, bytes) != 0) return cudaErrorInvalidValue;
  *block = static_cast<T*>(address);
  std::memset(*block, 0xFF, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* block) { return std::free(block), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemset(void* block, int value, size_t bytes) {
  return std::memset(block, value, bytes), cudaSuccess;
}

using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = new std::chrono::steady_clock::time_point, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *event = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  *milliseconds = std::chrono::duration<float, std::milli>(*stop - *start).count();
  return cudaSuccess;
}
