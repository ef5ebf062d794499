// How the CPU backend runs a call: decided here, from facts alone, so that it can be tested and
// told.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/dropout.h"

namespace lora_ext {

struct CpuProblem {
  int64_t M, N, K, r;
  bool dropout;
  bool bf16;              // base and adapters
  bool bf16_dot;          // this CPU has kernels on bf16 dot products
  bool mixed;             // fp32 adapters on a 16-bit base
  bool fast_blas;         // ATen's BLAS multiplies the base's dtype at full speed on this CPU
  int64_t compute_bytes;  // size of the type that sums are kept in
  int64_t threads;
};

// Ranges of rows for so many threads, each with sums of its own over its rows. Sums of very many
// rows are made of several, so that none adds up too many in sequence.
inline int64_t parts_for_sums(int64_t M, int64_t threads) {
  constexpr int64_t kMaxRows = 1024;
  const int64_t parts = std::max<int64_t>(1, threads), rows = parts * kMaxRows;
  return parts * std::max<int64_t>(1, (M + rows - 1) / rows);
}

struct CpuPath {
  // BLAS calls for the low-rank products, vector kernels, or those on bf16 dot products.
  enum class Kernels { Blas, Vector, Bf16Dot };
  Kernels kernels;
  const char* reason;  // for the choice of `kernels`
  int64_t fwd_parts;   // ranges of rows, one thread each
  int64_t bwd_parts;
};

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

  CpuPath path{};
  if (problem.mixed) {
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
    path.reason = "no dropout, and BLAS multiplies bf16 at twice the rate of float32 kernels";
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

// How dora_linear makes the product of W with the kept elements of x, and its gradient.
struct DroppedPath {
  bool skips;  // the product with all of x less one with the dropped elements; or a dense product
  const char* reason;
};

// Places in the lists of a chunk of rows, one for each element at most, are int32.
constexpr int64_t kMaxDropped = std::numeric_limits<int32_t>::max();

inline DroppedPath choose_dropped_path(int64_t M, int64_t K, double dropout_p, bool bf16,
                                       bool fast_blas) {
  // W is transposed panel by panel in every call, which fewer rows do not pay for.
  constexpr int64_t kMinRows = 64;
  // Lists of dropped elements are multiplied at less than the rate of BLAS, half as fast in float32
  // and a quarter in bf16: measured on AVX-512. Where BLAS is slow they pay longer, but the
  // difference of two products loses 1 / (1 - p) of what x W^T was rounded to.
  const double max_dropout_p = fast_blas && bf16 ? 0.25 : 0.5;
  if (K == 0) return {false, "there is nothing to drop"};
  if (K > kMaxDropped - kDropoutBlock) return {false, "a row is too long for lists"};
  if (M < kMinRows) return {false, "few rows do not pay for packing the weight"};
  if (dropout_p > max_dropout_p) {
    return {false, fast_blas ? "so many elements are dropped that BLAS is faster"
                             : "so many elements are dropped that their product would lose digits"};
  }
  return {true, "its second base product is one with the dropped elements alone"};
}

// Rows are cut into chunks, so that sums of a chunk stay in the L2 cache; smaller ones where there
// would be too few tasks, chunks times `parts`, for the threads, or too many places in a list.
inline int64_t rows_per_chunk(int64_t M, int64_t K, int64_t parts, int64_t threads) {
  constexpr int64_t kMaxRows = 1024, kMinRows = 128, kTasksPerThread = 4;
  const auto divup = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t chunks = divup(kTasksPerThread * threads, parts);
  const int64_t rows = std::clamp(divup(M, chunks), kMinRows, kMaxRows);
  return std::min(rows, kMaxDropped / (divup(K, kDropoutBlock) * kDropoutBlock));
}

}  // namespace lora_ext
