// How the CPU backend runs lora_linear: decided here, from facts alone, so that tests reach every
// branch and `explain` can give the reason.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parts.h"

namespace lora_ext {

struct CpuProblem {
  int64_t M, N, K, r;
  bool dropout;
  bool bf16;              // base and adapters
  bool bf16_dot;          // this CPU has kernels on bf16 dot products
  bool mixed;             // fp32 adapters on a 16-bit base
  bool fast_blas;         // ATen's BLAS multiplies such rows of the base's dtype at full speed
  bool half;              // the base has 16 bits
  bool faster_bf16;       // BLAS makes more products of bf16 than of float32 in the same time
  bool grouped;           // rows of one adapter of several: BLAS needs copies of them
  int64_t compute_bytes;  // size of the type that sums are kept in
  int64_t threads;
};

struct CpuPath {
  // BLAS calls for the low-rank products, vector kernels, or those on bf16 dot products.
  enum class Kernels { Blas, Vector, Bf16Dot };
  Kernels kernels;
  bool widens;         // BLAS multiplies in the compute type, x, dy and the adapter are widened
  const char* reason;  // for the choice of `kernels`
  int64_t fwd_parts;   // ranges of rows, one thread each
  int64_t bwd_parts;
};

// From which rank on BLAS takes no longer than the vector kernels, which read lora_A and lora_B
// again for every panel of rows: measured in sizes from 256 to 4096, of 72 rows or more. In 16 bits
// it has x, dy and the adapter widened before. Up to 64 a batch of many adapters, which keeps the
// kernels, has the bits of a call for each.
inline int64_t large_rank(const CpuProblem& problem) {
  if (problem.bf16 && problem.bf16_dot) return 65;
  return problem.half ? 256 : 128;
}

inline CpuPath choose_cpu_path(const CpuProblem& problem) {
  // Dot products need lora_A and lora_B in pairs, which fewer rows do not pay for.
  constexpr int64_t kMinRowsForDot = 16;
  // A smaller range does not pay for waking a thread; in backward it must also pay for sums of its
  // own, which are as large as lora_A and lora_B.
  constexpr int64_t kMinRowsPerFwdPart = 4;
  constexpr int64_t kMinRowsPerBwdPart = 32;
  // Every backward part sums into its own dA and dB: keep them within this many bytes together.
  constexpr int64_t kMaxPartialSumBytes = int64_t{256} << 20;

  // Up to so many rows, with adapters of so many elements, kernels spend their time on transposes
  // and on sums as large as the gradients, which BLAS does not need. With dropout BLAS needs a copy
  // of x and its mask, so it pays later, and beside dot products never.
  constexpr int64_t kFewRows = 64;
  const bool dot = problem.bf16 && problem.bf16_dot && problem.M >= kMinRowsForDot;
  const int64_t large_adapter = int64_t{1} << (dot || problem.dropout ? 18 : 16);
  const bool blas_pays = problem.M <= kFewRows && !(dot && problem.dropout) &&
                         (problem.N + problem.K) * problem.r > large_adapter;

  // Beside a 16-bit base float32 adapters need no widening, which fewer rows do not pay for.
  const int64_t many_rows = problem.mixed ? 16 : kFewRows + 1;
  const bool large = !problem.grouped && problem.M >= many_rows && problem.r >= large_rank(problem);

  CpuPath path{};
  if (large) {
    path.kernels = CpuPath::Kernels::Blas;
    path.widens = problem.half && !(problem.bf16 && problem.faster_bf16);
    path.reason = path.widens ? "a large rank: low-rank products are float32's, by BLAS"
                              : "a large rank: low-rank products are BLAS's";
  } else if (problem.mixed) {
    path.kernels = CpuPath::Kernels::Vector;
    path.reason = "float32 adapters are read beside a 16-bit base without a copy of x";
  } else if (!problem.fast_blas) {
    path.kernels = CpuPath::Kernels::Vector;
    path.reason = "BLAS is slow in this dtype on this CPU";
  } else if (blas_pays) {
    path.kernels = CpuPath::Kernels::Blas;
    path.reason = "few rows and a large adapter";
  } else if (dot) {
    path.kernels = CpuPath::Kernels::Bf16Dot;
    path.reason = "bf16 is multiplied as it is, in one pass over x and one over dy";
  } else if (problem.dropout) {
    path.kernels = CpuPath::Kernels::Vector;
    path.reason = "dropout is made in cache, inside the low-rank products";
  } else if (problem.bf16) {
    path.kernels = CpuPath::Kernels::Blas;
    path.reason = "too few rows for dot products of vector kernels";
  } else {
    path.kernels = CpuPath::Kernels::Vector;
    path.reason = "one pass over x and one over dy";
  }
  const auto parts = [&](int64_t min_rows) {
    return std::max<int64_t>(1, std::min(problem.threads, problem.M / min_rows));
  };
  const int64_t sum_bytes =
      std::max<int64_t>(1, (problem.N + problem.K) * problem.r * problem.compute_bytes);
  path.fwd_parts = parts(kMinRowsPerFwdPart);
  path.bwd_parts = std::min(parts_for_sums(problem.M, parts(kMinRowsPerBwdPart)),
                            std::max<int64_t>(1, kMaxPartialSumBytes / sum_bytes));
  return path;
}

// Whether the low-rank parts of several layers of one x run together, panel by panel. That saves
// reading x, and writing and adding up dx, for each layer: a share of the work that shrinks with
// the sum of ranks. And it reads all adapters again for every panel, which have to stay in cache.
inline bool pays_together(int64_t ranks, int64_t adapter_elements) {
  constexpr int64_t kMaxRanks = 96;
  constexpr int64_t kMaxAdapterElements = int64_t{3} << 18;
  return ranks <= kMaxRanks && adapter_elements <= kMaxAdapterElements;
}

}  // namespace lora_ext
