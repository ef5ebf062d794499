// Libraries that are loaded where they are, so that nothing of them is needed for building: cuBLAS,
// which a CUDA build of torch brings, and NVML, which the driver does.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace gpu_bench {

class Library {
 public:
  // The first that can be loaded; `why` says what became of them else.
  explicit Library(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (handle_) return;
      why_ += (why_.empty() ? "" : "; ") + std::string(dlerror());
    }
  }
  bool loaded() const { return handle_ != nullptr; }
  const std::string& why() const { return why_; }

  template <class Function>
  Function* find(const char* name) const {
    void* const symbol = handle_ ? dlsym(handle_, name) : nullptr;
    if (handle_ && !symbol) throw std::runtime_error(std::string("the library lacks ") + name);
    return reinterpret_cast<Function*>(symbol);
  }

 private:
  void* handle_ = nullptr;
  std::string why_;
};

// The base products of a frozen layer, as torch calls them: cublasGemmEx of 16-bit matrices with
// sums in float, and 32 MiB to work in, torch's figure for Hopper.
class Cublas {
 public:
  explicit Cublas(const std::string& path)
      : library_(path.empty() ? std::vector<std::string>{"libcublas.so.13", "libcublas.so.12"}
                              : std::vector<std::string>{path}) {
    if (!library_.loaded()) return;
    const auto create = library_.find<int(void**)>("cublasCreate_v2");
    const auto set_workspace = library_.find<int(void*, void*, size_t)>("cublasSetWorkspace_v2");
    const auto get_version = library_.find<int(void*, int*)>("cublasGetVersion_v2");
    gemm_ = library_.find<Gemm>("cublasGemmEx");
    succeed(create(&handle_), "cublasCreate");
    constexpr size_t kWorkspace = size_t{32} << 20;
    succeed(set_workspace(handle_, memory_.fresh<uint8_t>(kWorkspace), kWorkspace),
            "cublasSetWorkspace");
    get_version(handle_, &version_);
  }
  bool there() const { return library_.loaded(); }
  const std::string& why() const { return library_.why(); }
  int version() const { return version_; }

  // y [M, N] = x [M, K] W^T + beta y, the weight [N, K]
  void forward(const lora_ext::Bf16* x, const lora_ext::Bf16* weight, lora_ext::Bf16* y, int64_t M,
               int64_t K, int64_t N, float beta) const {
    gemm(kTransposed, N, M, K, weight, K, x, K, y, N, beta);
  }
  // dx [M, K] = dy [M, N] W + beta dx
  void backward(const lora_ext::Bf16* dy, const lora_ext::Bf16* weight, lora_ext::Bf16* dx,
                int64_t M, int64_t K, int64_t N, float beta) const {
    gemm(kAsItIs, K, M, N, weight, K, dy, N, dx, K, beta);
  }

 private:
  // As cublas_api.h declares it, its enumerations as int.
  using Gemm = int(void* handle, int transposed_a, int transposed_b, int m, int n, int k,
                   const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                   int ldb, const void* beta, void* c, int type_c, int ldc, int compute_type,
                   int algorithm);
  static constexpr int kAsItIs = 0, kTransposed = 1, kSumsInFloat = 68, kAnyAlgorithm = -1;

  static void succeed(int status, const char* what) {
    if (status == 0) return;
    throw std::runtime_error(std::string(what) + ": cuBLAS's status " + std::to_string(status));
  }
  // Its matrices are by columns: a row-major one is its own transpose there. c [n, m] by rows.
  void gemm(int transposed_a, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda,
            const void* b, int64_t ldb, void* c, int64_t ldc, float beta) const {
    const float one = 1.0f;
    succeed(gemm_(handle_, transposed_a, kAsItIs, int(m), int(n), int(k), &one, a, CUDA_R_16BF,
                  int(lda), b, CUDA_R_16BF, int(ldb), &beta, c, CUDA_R_16BF, int(ldc), kSumsInFloat,
                  kAnyAlgorithm),
            "cublasGemmEx");
  }

  Library library_;
  gpu_test::Memory memory_;
  Gemm* gemm_ = nullptr;
  void* handle_ = nullptr;
  int version_ = 0;
};

// What the driver says of the first GPU now; zeros and "" where there is no NVML.
class Nvml {
 public:
  Nvml() : library_({"libnvidia-ml.so.1"}) {
    if (!library_.loaded()) return;
    char bus[32] = "";
    const auto by_bus = library_.find<int(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
    if (library_.find<int()>("nvmlInit_v2")() != 0) return;
    if (cudaDeviceGetPCIBusId(bus, sizeof(bus), 0) != cudaSuccess) return;
    if (by_bus(bus, &device_) != 0) device_ = nullptr;
  }
  std::string driver() const {
    char text[96] = "";
    const auto ask = library_.find<int(char*, unsigned)>("nvmlSystemGetDriverVersion");
    if (ask) ask(text, sizeof(text) - 1);
    return text;
  }
  unsigned sm_mhz() const { return clock(1); }
  unsigned memory_mhz() const { return clock(2); }
  unsigned watts() const {
    unsigned milliwatts = 0;
    const auto ask = library_.find<int(void*, unsigned*)>("nvmlDeviceGetPowerUsage");
    if (device_ && ask(device_, &milliwatts) != 0) return 0;
    return milliwatts / 1000;
  }

 private:
  unsigned clock(int which) const {
    unsigned mhz = 0;
    const auto ask = library_.find<int(void*, int, unsigned*)>("nvmlDeviceGetClockInfo");
    if (device_ && ask(device_, which, &mhz) != 0) return 0;
    return mhz;
  }
  Library library_;
  void* device_ = nullptr;
};

}  // namespace gpu_bench
