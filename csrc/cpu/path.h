// How the CPU backend runs a call: decided here, from sizes alone, so that it can be tested and told.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lora_ext {

struct CpuPath {
  bool transpose_B;    // forward reads B^T [r, N], made once per call, instead of B [N, r]
  int64_t fwd_parts;   // ranges of rows, one thread each
  int64_t bwd_parts;
};

inline CpuPath choose_cpu_path(int64_t M, int64_t N, int64_t K, int64_t r, int64_t threads,
                               int64_t compute_bytes) {
  // Below this many rows, transposing B costs more than its row-by-row products save.
  constexpr int64_t kMinRowsToTransposeB = 8;
  // A smaller range does not pay for waking a thread.
  constexpr int64_t kMinRowsPerPart = 4;
  // Every backward part sums into its own dA and dB: keep them within this many bytes together.
  constexpr int64_t kMaxPartialSumBytes = int64_t{256} << 20;

  const int64_t parts = std::max<int64_t>(1, std::min(threads, M / kMinRowsPerPart));
  const int64_t sum_bytes = std::max<int64_t>(1, (N + K) * r * compute_bytes);
  const int64_t affordable = std::max<int64_t>(1, kMaxPartialSumBytes / sum_bytes);
  return {M >= kMinRowsToTransposeB, parts, std::min(parts, affordable)};
}

}  // namespace lora_ext
