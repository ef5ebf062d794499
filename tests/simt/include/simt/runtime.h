// CUDA's runtime, as far as csrc/kernels/arch/launch.h calls it. It refuses what the GPU that a
// test chose would refuse, with CUDA's errors; what a kernel does wrong is thrown as simt::Error.
#pragma once

#include <map>
#include <mutex>

#include "simt/launch.h"
#include "simt/recorded.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {

// Of the last call that failed, until it is asked for.
inline cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

// A GPU is one for each kind and number of multiprocessors that options have described.
inline int device_of_options() {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> devices;
  const std::lock_guard lock(mutex);
  const std::pair kind(options().compute_capability, options().multiprocessors);
  return devices.try_emplace(kind, static_cast<int>(devices.size())).first->second;
}

// The shared memory that a kernel may have on a GPU: what it asked for, or what all have.
class AllowedShared {
 public:
  void set(const void* kernel, size_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_[{kernel, device_of_options()}] = bytes;
  }
  size_t get(const void* kernel) const {
    const std::lock_guard lock(mutex_);
    const auto found = bytes_.find({kernel, device_of_options()});
    return found == bytes_.end() ? size_t{kSharedWithoutAsking} : found->second;
  }

 private:
  std::map<std::pair<const void*, int>, size_t> bytes_;
  mutable std::mutex mutex_;
};

inline AllowedShared& allowed_shared() {
  static AllowedShared instance;
  return instance;
}

// What its attributes ask for.
struct Asked {
  bool dependent = false;
  dim3 cluster = dim3(1);

  explicit Asked(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const auto& [id, value] = config.attrs[i];
      if (id == cudaLaunchAttributeClusterDimension) {
        cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
      } else {
        dependent = value.programmaticStreamSerializationAllowed != 0;
      }
    }
  }
};

// Clusters along x alone are emulated.
inline bool valid_cluster(const cudaLaunchConfig_t& config, dim3 cluster) {
  const bool there = options().compute_capability >= 90 || cluster.x == 1;
  return there && cluster.x >= 1 && cluster.x <= kMostBlocksOfCluster && cluster.y == 1 &&
         cluster.z == 1 && config.gridDim.x % cluster.x == 0;
}

inline cudaError_t check_limits(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim;
  const bool valid = grid.x >= 1 && grid.x <= kMostBlocksX && grid.y >= 1 &&
                     grid.y <= kMostBlocksYZ && grid.z >= 1 && grid.z <= kMostBlocksYZ &&
                     config.blockDim.x >= 1 && config.blockDim.x <= kMostThreads &&
                     valid_cluster(config, Asked(config).cluster);
  if (!valid) return cudaErrorInvalidConfiguration;
  const size_t bytes = config.dynamicSmemBytes;
  const auto most = static_cast<size_t>(shared_bytes_of(options().compute_capability));
  return bytes <= most && bytes <= allowed_shared().get(kernel) ? cudaSuccess
                                                                : cudaErrorInvalidValue;
}

}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error(), cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device_of_options();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Options& options = simt::options();
  ++simt::questions();
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? options.multiprocessors
               : simt::shared_bytes_of(options.compute_capability);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  ++simt::questions();
  const int most = simt::shared_bytes_of(simt::options().compute_capability);
  if (bytes < 0 || bytes > most) return simt::failed(cudaErrorInvalidValue);
  simt::allowed_shared().set(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

// Of blocks that have a multiprocessor each; an H100 has 16 or 18 of them side by side.
template <class Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(Params),
                                           const cudaLaunchConfig_t* config) {
  const auto error = simt::check_limits(*config, reinterpret_cast<const void*>(kernel));
  const int multiprocessors = simt::options().multiprocessors;
  const auto blocks = static_cast<int>(simt::Asked(*config).cluster.x);
  *count = (multiprocessors > 18 ? multiprocessors / 33 * 32 : multiprocessors) / blocks;
  return simt::failed(error);
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  const auto error = simt::check_limits(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return simt::failed(error);
  const simt::Asked asked(*config);
  simt::recorded().push_back({reinterpret_cast<const void*>(kernel), config->gridDim,
                              config->blockDim, asked.cluster, config->dynamicSmemBytes,
                              asked.dependent});
  if (simt::options().limits_only) return cudaSuccess;
  simt::run_grid(config->gridDim, asked.cluster.x, static_cast<int>(config->blockDim.x),
                 static_cast<int>(config->dynamicSmemBytes), asked.dependent,
                 [&] { kernel(params); });
  return cudaSuccess;
}
