// How the CPU backend runs a call: decided here, from facts alone, so that it can be tested and
// told.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lora_ext {

struct CpuProblem {
  int64_t M, N, K, r;
  bool dropout;
  bool bf16;              // base and adapters
  bool mixed;             // fp32 adapters on a 16-bit base
  bool fast_blas;         // ATen's BLAS multiplies the base's dtype at full speed on this CPU
  int64_t compute_bytes;  // size of the type that sums are kept in
  int64_t threads;
};

struct CpuPath {
  bool blas;           // the low-rank products are BLAS calls too, else vector kernels
  const char* reason;  // for the choice of `blas`
  bool transpose_B;    // forward reads B^T [r, N], made once per call, instead of B [N, r]
  int64_t fwd_parts;   // ranges of rows, one thread each
  int64_t bwd_parts;
};

inline CpuPath choose_cpu_path(const CpuProblem& problem) {
  // Below this many rows, transposing B costs more than its row-by-row products save.
  constexpr int64_t kMinRowsToTransposeB = 8;
  // A smaller range does not pay for waking a thread; in backward it must also pay for sums of its
  // own, which are as large as lora_A and lora_B.
  constexpr int64_t kMinRowsPerFwdPart = 4;
  constexpr int64_t kMinRowsPerBwdPart = 32;
  // Every backward part sums into its own dA and dB: keep them within this many bytes together.
  constexpr int64_t kMaxPartialSumBytes = int64_t{256} << 20;

  // Below so many rows, with adapters of so many elements, the vector kernels spend their time on
  // B^T and on sums as large as the gradients, which BLAS does not need. With dropout BLAS needs a
  // copy of x and its mask, so it pays later.
  constexpr int64_t kFewRows = 64;
  const int64_t large_adapter = int64_t{1} << (problem.dropout ? 18 : 16);
  const bool few_rows_large_adapter =
      problem.M < kFewRows && (problem.N + problem.K) * problem.r > large_adapter;

  CpuPath path{};
  path.blas = !problem.mixed && problem.fast_blas &&
              (few_rows_large_adapter || (problem.bf16 && !problem.dropout));
  if (problem.mixed) {
    path.reason = "float32 adapters are read beside a 16-bit base without a copy of x";
  } else if (!problem.fast_blas) {
    path.reason = "BLAS is slow in this dtype on this CPU";
  } else if (few_rows_large_adapter) {
    path.reason = "few rows and a large adapter";
  } else if (problem.dropout) {
    path.reason = "dropout is made in cache, inside the low-rank products";
  } else if (problem.bf16) {
    path.reason = "no dropout, and BLAS multiplies bf16 at twice the rate of float32 kernels";
  } else {
    path.reason = "one pass over x and one over dy";
  }
  path.transpose_B = problem.M >= kMinRowsToTransposeB;
  const auto parts = [&](int64_t min_rows) {
    return std::max<int64_t>(1, std::min(problem.threads, problem.M / min_rows));
  };
  const int64_t sum_bytes =
      std::max<int64_t>(1, (problem.N + problem.K) * problem.r * problem.compute_bytes);
  path.fwd_parts = parts(kMinRowsPerFwdPart);
  path.bwd_parts =
      std::min(parts(kMinRowsPerBwdPart), std::max<int64_t>(1, kMaxPartialSumBytes / sum_bytes));
  return path;
}

}  // namespace lora_ext
