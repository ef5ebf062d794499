// What the kernels of sm_90a share: a block of one warpgroup that loads and others that multiply,
// and the ring of shared memory between them.
#pragma once

#include "arch/arch.h"

namespace lora_ext::sm90 {

using arch::Major, arch::Swizzle;

constexpr int kWarpgroup = 128;
constexpr int kMostSharedBytes = 227 * 1024;  // that a block may have
constexpr int kRowBytes = 128;  // of a box of TMA: the span of its swizzle, 64 elements

// Registers of a thread that loads and of one that multiplies: those of a block are 65536.
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;

// The size of the running block's cluster, and which of its blocks it is.
struct Cluster {
  int size, rank;
};

// Slots of shared memory that are used in turn, with two mbarriers each: full when TMA has filled
// the slot, empty when every warp that multiplies is done with it; in a cluster whose blocks fill
// each other's slots, every warp of all of them. Distances are in bytes from the
// beginning of the block's shared memory, at the address `shared`.
struct Ring {
  uint32_t shared;
  int first, bytes;  // of the slots
  int barriers;      // where they begin
  int count;

  LORA_EXT_DEVICE int offset(int slot) const { return first + slot * bytes; }
  LORA_EXT_DEVICE uint32_t data(int slot) const {
    return shared + static_cast<uint32_t>(offset(slot));
  }
  LORA_EXT_DEVICE uint32_t full(int slot) const {
    return shared + static_cast<uint32_t>(barriers + slot * 16);
  }
  LORA_EXT_DEVICE uint32_t empty(int slot) const { return full(slot) + 8; }

  // By one thread, for so many warps that multiply; fence_mbarrier_init comes after it.
  LORA_EXT_DEVICE void initialise(int warps) const {
    for (int slot = 0; slot < count; ++slot) {
      arch::mbarrier_init(full(slot), 1);
      arch::mbarrier_init(empty(slot), static_cast<uint32_t>(warps));
    }
  }
};

// Where a thread stands in a ring: at which slot, in a turn of which parity.
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  LORA_EXT_DEVICE void advance(int count) {
    if (++slot < count) return;
    slot = 0, parity ^= 1;
  }
};

}  // namespace lora_ext::sm90
