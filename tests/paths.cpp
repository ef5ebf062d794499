// choose_cpu_path and choose_cuda_path for tests/test_paths.py: what they say about the facts
// given.
#include "cpu/path.h"
#include "cuda/path.h"

using namespace lora_ext;

struct ChosenPath {
  int kernels;
  const char* name;  // of a CUDA path
  const char* reason;
  int64_t fwd_parts, bwd_parts;  // of a CPU path
};

extern "C" ChosenPath cpu_path(int64_t M, int64_t N, int64_t K, int64_t r, bool dropout, bool bf16,
                               bool bf16_dot, bool mixed, bool fast_blas, int64_t compute_bytes,
                               int64_t threads) {
  const CpuPath path = choose_cpu_path(
      {M, N, K, r, dropout, bf16, bf16_dot, mixed, fast_blas, compute_bytes, threads});
  return {static_cast<int>(path.kernels), nullptr, path.reason, path.fwd_parts, path.bwd_parts};
}

extern "C" ChosenPath cuda_path(int64_t N, int64_t K, int64_t r, bool half, int compute_capability,
                                bool sm90, int wish) {
  const CudaPath path =
      choose_cuda_path({N, K, r, half, compute_capability, sm90, static_cast<CudaWish>(wish)});
  return {static_cast<int>(path.kernels), cuda_path_name(path.kernels), path.reason, 0, 0};
}
