// How the CUDA backend runs a call: decided here, from facts alone, so that it can be tested and
// told.
#pragma once

#include <cstdint>

namespace lora_ext {

struct CudaProblem {
  bool half;               // bf16 or fp16 base
  int compute_capability;  // 80 for sm_80
  int64_t rank;
};

struct CudaPath {
  bool fused;          // the kernels of csrc/kernels, else ATen's products
  const char* reason;  // for that choice
};

inline CudaPath choose_cuda_path(const CudaProblem& problem) {
  constexpr int64_t kMaxRank = 256;  // beyond, the low-rank products are worth a BLAS
  if (!problem.half) return {false, "float32 and float64 products are cuBLAS's"};
  if (problem.compute_capability < 80) return {false, "the kernels need a GPU from sm_80 on"};
  if (problem.rank == 0 || problem.rank > kMaxRank)
    return {false, "the kernels take ranks 1 to 256"};
  return {true,
          "one pass over x and one over dy, low-rank products inside the base product's kernel"};
}

}  // namespace lora_ext
