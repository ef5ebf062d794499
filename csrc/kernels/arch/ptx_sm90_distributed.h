// Plain reads of the shared memory of the other blocks of a cluster, on sm_90.
#pragma once

#include "../element.h"

namespace lora_ext::arch {

// cluster_sync, after which all threads see what all had stored to shared memory.
LORA_EXT_DEVICE void cluster_sync_stores() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// At a cluster_address.
LORA_EXT_DEVICE float cluster_load_float(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

}  // namespace lora_ext::arch
