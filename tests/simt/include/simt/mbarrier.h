// The 64-bit barrier in shared memory that counts arrivals of threads and bytes of TMA.
#pragma once

#include <cstring>
#include <string>

#include "kernels/arch/wait_report.h"
#include "simt/cluster.h"

namespace simt {

struct Mbarrier {
  // Shows that mbarrier_init wrote it: neither poison nor data look like that.
  static constexpr uint64_t kMark = 0x2BAD;

  uint64_t phase : 1;      // of the two that alternate, the one that is not complete
  uint64_t fenced : 1;     // TMA may use it
  uint64_t expected : 11;  // arrivals of each phase
  uint64_t pending : 11;
  uint64_t mark : 16;
  int64_t bytes : 24;  // that TMA still has to deliver in this phase

  // Those of the next phase are counted from here on.
  void complete_phase_if_done() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = expected;
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline std::string mbarrier_states(const Block& block) {
  std::string report;
  for (const uint32_t address : block.mbarriers) {
    Mbarrier barrier;
    std::memcpy(&barrier, block.shared.at(address), sizeof(barrier));
    report += "; mbarrier at byte " + std::to_string(address - SharedMemory::kAlignment) + ": " +
              std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected) +
              " arrivals and " + std::to_string(barrier.bytes) + " bytes to come";
  }
  return report;
}

// In shared memory of the running block, unless the address is of another one's.
inline Mbarrier& mbarrier_at(Place place) {
  auto& [block, address] = place;
  simt::block().check(address % 8 == 0 && block.shared.contains(address, 8),
                      "mbarrier: no address of eight bytes of shared memory");
  auto* barrier = reinterpret_cast<Mbarrier*>(block.shared.at(address));
  simt::block().check(barrier->mark == Mbarrier::kMark,
                      "mbarrier: not initialised, or overwritten");
  return *barrier;
}
inline Mbarrier& mbarrier_at(uint32_t address) { return mbarrier_at(place_of(address)); }

}  // namespace simt

namespace lora_ext::arch {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  simt::Block& block = simt::block();
  block.check(barrier % 8 == 0 && block.shared.contains(barrier, 8),
              "mbarrier_init: no address of eight bytes of shared memory");
  block.check(arrivals >= 1 && arrivals <= 1024, "mbarrier_init: 1 to 1024 arrivals");
  const simt::Mbarrier initial = {.phase = 0,
                                  .fenced = 0,
                                  .expected = arrivals,
                                  .pending = arrivals,
                                  .mark = simt::Mbarrier::kMark,
                                  .bytes = 0};
  std::memcpy(block.shared.at(barrier), &initial, sizeof(initial));
  block.mbarriers.push_back(barrier);
}

inline void fence_mbarrier_init() {
  for (const uint32_t barrier : simt::block().mbarriers) simt::mbarrier_at(barrier).fenced = 1;
}

inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  simt::Mbarrier& state = simt::mbarrier_at(barrier);
  simt::block().check(state.pending > 0, "mbarrier_arrive: more arrivals than it was made for");
  state.bytes += bytes;
  --state.pending;
  state.complete_phase_if_done();
  simt::block().preempt();
}

inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_arrive_at(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }

inline void mbarrier_arrive_cluster(uint32_t barrier) {
  simt::block().thread().sees_cluster = false;
  mbarrier_arrive_at(barrier);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  struct Phase {
    const simt::Mbarrier* barrier;
    uint32_t parity;
    static bool over(const void* phase) {
      const auto& [barrier, parity] = *static_cast<const Phase*>(phase);
      return barrier->phase != parity;
    }
  } const phase{&simt::mbarrier_at(barrier), parity};
  simt::block().check(parity <= 1, "mbarrier_wait: parity is 0 or 1");
  if (!Phase::over(&phase)) simt::block().wait(Phase::over, &phase, "mbarrier_wait");
  simt::block().preempt();
}

inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  simt::block().thread().sees_cluster = true;
}

// A deadlock is seen without counting.
inline void mbarrier_wait_bounded(uint32_t barrier, uint32_t parity, WaitReport*, int, int) {
  mbarrier_wait(barrier, parity);
}

// A GPU may give up and return false; here it waits, so that a deadlock is seen.
inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  return true;
}

}  // namespace lora_ext::arch
