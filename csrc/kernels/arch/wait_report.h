// What a kernel that waits without end leaves behind before it stops: nothing else of it can be
// read afterwards, since its memory is lost with it. The report is the host's memory.
#pragma once

#include <string>

namespace lora_ext::arch {

struct WaitReport {
  uint32_t filled, barrier, parity, block, thread;  // the barrier's address in shared memory

#if defined(__CUDACC__)
  LORA_EXT_DEVICE void fill(uint32_t of, uint32_t in_parity) {
    volatile WaitReport* out = this;
    out->barrier = of, out->parity = in_parity;
    out->block = blockIdx.y * gridDim.x + blockIdx.x, out->thread = threadIdx.x;
    __threadfence_system();
    out->filled = 1;
  }
#endif

  // For the message of the error that follows; empty if nothing was reported.
  std::string text() const {
    if (filled == 0) return "";
    return "; before it a kernel of lora_ext was stopped because a wait had no end: block " +
           std::to_string(block) + ", thread " + std::to_string(thread) + ", mbarrier at byte " +
           std::to_string(barrier) + " of shared memory, parity " + std::to_string(parity) +
           ". This is a bug of lora_ext: please report it. LORA_EXT_CUDA_PATH=composed runs "
           "without its kernels";
  }
};

}  // namespace lora_ext::arch
