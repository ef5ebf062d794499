// What a kernel that waits without end leaves behind before it stops: nothing else of it can be
// read afterwards, since its memory is lost with it. The report is the host's memory.
#pragma once

#include <string>

namespace lora_ext::arch {

// Kernels with bounded waits; each has a report of its own.
enum class WaitingKernel { kProduct, kLowRank };
constexpr int kWaitingKernels = 2;

constexpr const char* name_of(WaitingKernel kernel) {
  return kernel == WaitingKernel::kProduct ? "product_sm90" : "low_rank_sm90";
}

struct WaitReport {
  uint32_t filled, barrier, parity, block, thread;  // the barrier's address in shared memory
  int32_t row, column;                              // where the tile begins; -1 after the last one

#if defined(__CUDACC__)
  LORA_EXT_DEVICE void fill(uint32_t of, uint32_t in_parity, int at_row, int at_column) {
    volatile WaitReport* out = this;
    out->barrier = of, out->parity = in_parity;
    out->block = blockIdx.y * gridDim.x + blockIdx.x, out->thread = threadIdx.x;
    out->row = at_row, out->column = at_column;
    __threadfence_system();
    out->filled = 1;
  }
#endif

  // For the message of the error that follows; empty if nothing was reported.
  std::string text(WaitingKernel kernel) const {
    if (filled == 0) return "";
    const std::string tile =
        row < 0 ? "after its last tile"
                : "tile from row " + std::to_string(row) + " and column " + std::to_string(column);
    return std::string("; before it lora_ext's kernel ") + name_of(kernel) +
           " was stopped because a wait had no end: block " + std::to_string(block) + ", " + tile +
           ", thread " + std::to_string(thread) + ", mbarrier at byte " + std::to_string(barrier) +
           " of shared memory, parity " + std::to_string(parity) +
           ". This is a bug of lora_ext: please report it. LORA_EXT_CUDA_PATH=composed runs "
           "without its kernels";
  }
};

}  // namespace lora_ext::arch
