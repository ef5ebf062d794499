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

inline void stmatrix_x4(uint32_t shared, const uint32_t (&in)[4]) {
  struct Slot {
    const uint32_t* in;
    uint32_t shared;
  } slot{in, shared};
  simt::block().warp_operation(0xFFFFFFFFu, "stmatrix.x4", &slot, [](const auto& slots) {
    simt::Block& block = simt::block();
    const auto slot_of = [&](int lane) {
      return static_cast<const Slot*>(slots[static_cast<size_t>(lane)]);
    };
    const int first_thread = block.thread().number / simt::kWarp * simt::kWarp;
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::array<int64_t, 8> accesses{};  // of each four banks
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = slot_of(matrix * 8 + row)->shared;
        block.check(address % 16 == 0, "stmatrix: an address is no multiple of 16");
        block.check(block.shared.contains(address, 16), "stmatrix: outside of shared memory");
        for (int pair = 0; pair < 4; ++pair) {
          std::memcpy(block.shared.at(address) + pair * 4, &slot_of(row * 4 + pair)->in[matrix], 4);
        }
        if (block.options.watch_stores) {
          block.proxies.attribute(address - simt::SharedMemory::kAlignment, 16,
                                  first_thread + matrix * 8 + row + 1);
        }
        ++accesses[address / 16 % 8];
      }
      block.counts.stmatrix_conflicts += *std::max_element(accesses.begin(), accesses.end()) - 1;
    }
  });
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
