// What CUDA gives kernels without an include: keywords, variables and functions.
//
// There is no __shared__: kernels take their shared memory with LORA_EXT_DYNAMIC_SHARED, which is
// the one whose ends and first reads are watched.
#pragma once

#include "simt/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::block().thread().index)
#define blockIdx (::simt::block().index)

namespace simt {

struct BlockSize {
  operator unsigned() const { return static_cast<unsigned>(block().thread_count); }
};
template <unsigned dim3::* kAxis>
struct GridSize {
  operator unsigned() const { return block().grid.*kAxis; }
};
struct BlockDim {
  BlockSize x;
};
struct GridDim {
  GridSize<&dim3::x> x;
  GridSize<&dim3::y> y;
  GridSize<&dim3::z> z;
};

}  // namespace simt

// No macros: cudaLaunchConfig_t has members of these names.
inline constexpr simt::BlockDim blockDim{};
inline constexpr simt::GridDim gridDim{};

inline void __syncthreads() {
  simt::block().barrier(0, simt::block().thread_count, "__syncthreads");
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  simt::block().warp_operation(mask, "__syncwarp", nullptr, [](const auto&) {});
}

namespace simt {

// Every lane of the mask gets the value of the lane that it names; its own where that is outside of
// the mask, which is undefined on a GPU, and an error here.
template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation) {
  struct Slot {
    T value;
    int source;
    T result;
  } slot{value, source, value};
  block().warp_operation(mask, operation, &slot, [mask](const auto& slots) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto* own = static_cast<Slot*>(slots[static_cast<size_t>(lane)]);
      block().check(mask >> own->source & 1, "a shuffle reads a lane that takes no part");
      own->result = static_cast<Slot*>(slots[static_cast<size_t>(own->source)])->value;
    }
  });
  return slot.result;
}

}  // namespace simt

// Lanes form groups of `width`. Who would read outside of its group keeps its value.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarp) {
  const int lane = simt::block().lane();
  return simt::shuffle(mask, value, lane / width * width + (source & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = simt::kWarp) {
  const int lane = simt::block().lane(), source = lane ^ flipped;
  const bool inside = source < (lane / width + 1) * width;
  return simt::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = simt::kWarp) {
  const int lane = simt::block().lane(), source = lane + distance;
  const bool inside = source < (lane / width + 1) * width;
  return simt::shuffle(mask, value, inside ? source : lane, "__shfl_down_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = simt::kWarp) {
  const int lane = simt::block().lane(), source = lane - distance;
  const bool inside = source >= lane / width * width;
  return simt::shuffle(mask, value, inside ? source : lane, "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Slot {
    bool vote;
    unsigned result;
  } slot{predicate != 0, 0};
  simt::block().warp_operation(mask, "__ballot_sync", &slot, [mask](const auto& slots) {
    const auto slot_of = [&](int lane) {
      return static_cast<Slot*>(slots[static_cast<size_t>(lane)]);
    };
    unsigned votes = 0;
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      if (mask >> lane & 1) votes |= unsigned{slot_of(lane)->vote} << lane;
    }
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      if (mask >> lane & 1) slot_of(lane)->result = votes;
    }
  });
  return slot.result;
}

// Blocks run on several threads of the operating system, so these are atomic there too. A block
// that waits for another one by reading memory in a loop would never let it run.

inline int atomicAdd(int* address, int value) {
  simt::block().preempt();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  simt::block().preempt();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  simt::block().preempt();
}
