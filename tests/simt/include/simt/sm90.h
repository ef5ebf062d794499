// The instructions of csrc/kernels/arch/ptx_sm90.h, with bodies that a CPU can run.
#pragma once

#include "simt/mbarrier.h"
#include "simt/tma.h"
#include "simt/wgmma.h"

// Kernels for sm_90a have a body.
#define LORA_EXT_SM90A 1

namespace lora_ext::arch {

inline void wait_for_previous_kernel() {
  simt::block().thread().may_access = true;
  simt::block().preempt();
}

inline void let_next_kernel_start() { simt::block().preempt(); }

inline void fence_proxy_async() {
  simt::Block& block = simt::block();
  block.proxies.fence(block.thread().number, block.options.watch_stores);
  fence_mbarrier_init();
}

// Barriers 1 to 15; 0 is that of __syncthreads.
inline void barrier_sync(int number, int threads) {
  simt::block().check(number > 0, "barrier_sync: barrier 0 is that of __syncthreads");
  simt::block().barrier(number, threads, "barrier_sync");
  simt::block().preempt();
}

inline void barrier_arrive(int number, int threads) {
  simt::block().check(number > 0, "barrier_arrive: barrier 0 is that of __syncthreads");
  simt::block().barrier(number, threads, "barrier_arrive", false);
  simt::block().preempt();
}

// The number of registers has no meaning here.
template <int kRegisters>
inline void register_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  simt::block().warpgroup_operation("register_increase", nullptr, [](const auto&) {});
}
template <int kRegisters>
inline void register_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  simt::block().warpgroup_operation("register_decrease", nullptr, [](const auto&) {});
}

}  // namespace lora_ext::arch
