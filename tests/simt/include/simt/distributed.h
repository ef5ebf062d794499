// The instructions of csrc/kernels/arch/ptx_sm90_distributed.h, with bodies that a CPU can run.
#pragma once

#include "simt/cluster.h"

namespace lora_ext::arch {

inline void cluster_sync_stores() { cluster_sync(); }

inline float cluster_load_float(uint32_t address) {
  const auto [block, place] = simt::place_of(address);
  const bool inside = place % 4 == 0 && block.shared.contains(place, 4);
  simt::block().check(inside, "cluster_load_float: no address of a float of shared memory");
  float value;
  std::memcpy(&value, block.shared.at(place), sizeof(value));
  return value;
}

}  // namespace lora_ext::arch
