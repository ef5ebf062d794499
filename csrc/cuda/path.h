// How the CUDA backend runs a call: decided here, from facts alone, so that it can be tested and
// told.
#pragma once

#include <cstdint>

namespace lora_ext {

// What LORA_EXT_CUDA_PATH asks for: the choice of choose_cuda_path; the kernels of csrc/kernels
// wherever they can run; or never those.
enum class CudaWish { Auto, Fused, Composed };
constexpr const char* kCudaWishNames[] = {"auto", "fused", "composed"};

struct CudaProblem {
  int64_t N, K, r;
  bool half;               // bf16 or fp16 base
  int compute_capability;  // 80 for sm_80
  bool sm90;               // this build has the kernels of sm_90a
  CudaWish wish;
};

struct CudaPath {
  // ATen's products (cuBLAS) for everything, the kernels for sm_80 and later, or those for sm_90a.
  enum class Kernels { Composed, Sm80, Sm90 };
  Kernels kernels;
  const char* reason;  // for that choice
};

inline CudaPath choose_cuda_path(const CudaProblem& problem) {
  using Kernels = CudaPath::Kernels;
  constexpr int64_t kMaxRank = 256;  // beyond, the low-rank products are worth a BLAS
  if (!problem.half) return {Kernels::Composed, "float32 and float64 products are cuBLAS's"};
  if (problem.compute_capability < 80) {
    return {Kernels::Composed, "the kernels need a GPU from sm_80 on"};
  }
  if (problem.r == 0 || problem.r > kMaxRank) {
    return {Kernels::Composed, "the kernels take ranks 1 to 256"};
  }
  if (problem.N == 0 || problem.K == 0) {
    return {Kernels::Composed, "the kernels take no empty matrices"};
  }
  if (problem.wish == CudaWish::Composed) {
    return {Kernels::Composed, "LORA_EXT_CUDA_PATH=composed"};
  }
  const auto fused =
      problem.sm90 && problem.compute_capability == 90 ? Kernels::Sm90 : Kernels::Sm80;
  if (problem.wish == CudaWish::Fused) return {fused, "LORA_EXT_CUDA_PATH=fused"};
  return {fused,
          "one pass over x and one over dy, low-rank products inside the base product's kernel"};
}

inline const char* cuda_path_name(CudaPath::Kernels kernels) {
  switch (kernels) {
    case CudaPath::Kernels::Sm90:
      return "cuda fused sm_90a";
    case CudaPath::Kernels::Sm80:
      return "cuda fused sm_80";
    default:
      return "cuda cublas";
  }
}

}  // namespace lora_ext
