// How the CUDA backend runs a call: decided here, from facts alone, so that it can be tested and
// told.
#pragma once

#include <cstdint>
#include <optional>

namespace lora_ext {

// What LORA_EXT_CUDA_PATH asks for: the choice of choose_cuda_path; the kernels of csrc/kernels for
// everything, or for all but the base product, wherever they can run; or never those.
enum class CudaWish { Auto, Fused, Hybrid, Composed };
constexpr const char* kCudaWishNames[] = {"auto", "fused", "hybrid", "composed"};

struct CudaCall {
  bool backward;
  int device;
  int64_t M, N, K, r;
  int base, adapter;  // at::ScalarType
  bool half;          // base is bf16 or fp16
  bool dropout;
};

struct CudaProblem {
  CudaCall call;
  int compute_capability;           // 80 for sm_80
  bool sm90;                        // this build has the kernels of sm_90a
  CudaWish wish;                    // of the environment
  std::optional<CudaWish> fastest;  // of those that autotune measured for this call
};

struct CudaPath {
  // ATen's products (cuBLAS) for everything; for the base product alone, added to what the kernels
  // made; or the kernels for sm_80 and later, or those for sm_90a, for everything.
  enum class Kernels { Composed, Hybrid, Sm80, Sm90 };
  Kernels kernels;
  const char* reason;  // for that choice
};

// Why the kernels of csrc/kernels cannot run a call; null where they can.
inline const char* why_no_kernels(const CudaCall& call, int compute_capability) {
  constexpr int64_t kMaxRank = 256;  // beyond, the low-rank products are worth a BLAS
  if (!call.half) return "float32 and float64 products are cuBLAS's";
  if (compute_capability < 80) return "the kernels need a GPU from sm_80 on";
  if (call.r == 0 || call.r > kMaxRank) return "the kernels take ranks 1 to 256";
  if (call.N == 0 || call.K == 0) return "the kernels take no empty matrices";
  return nullptr;
}

inline CudaPath choose_cuda_path(const CudaProblem& problem) {
  using Kernels = CudaPath::Kernels;
  const int capability = problem.compute_capability;
  if (const char* reason = why_no_kernels(problem.call, capability)) {
    return {Kernels::Composed, reason};
  }
  const auto fused = problem.sm90 && capability == 90 ? Kernels::Sm90 : Kernels::Sm80;
  const auto kernels = [&](CudaWish wish) {
    if (wish == CudaWish::Composed) return Kernels::Composed;
    return wish == CudaWish::Hybrid ? Kernels::Hybrid : fused;
  };
  if (problem.wish != CudaWish::Auto) {
    return {kernels(problem.wish), "LORA_EXT_CUDA_PATH says so"};
  }
  if (problem.fastest) {
    return {kernels(*problem.fastest), "the fastest that autotune measured on this GPU"};
  }
  // Tensor cores of sm_90 and of sm_100 to sm_110 run at their rate for instructions of their own.
  if (fused == Kernels::Sm80 && capability >= 90 && capability < 120) {
    return {Kernels::Hybrid,
            "mma.sync is slow on this GPU: cuBLAS makes the base product, kernels the rest"};
  }
  return {fused,
          "one pass over x and one over dy, low-rank products inside the base product's kernel"};
}

inline const char* cuda_path_name(CudaPath::Kernels kernels) {
  switch (kernels) {
    case CudaPath::Kernels::Sm90:
      return "cuda fused sm_90a";
    case CudaPath::Kernels::Sm80:
      return "cuda fused sm_80";
    case CudaPath::Kernels::Hybrid:
      return "cuda hybrid";
    default:
      return "cuda cublas";
  }
}

}  // namespace lora_ext
