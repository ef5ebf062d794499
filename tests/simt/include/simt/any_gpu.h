// The instructions of csrc/kernels/arch/any_gpu.h, with bodies that a CPU can run.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/block.h"

namespace lora_ext::arch {

struct alignas(16) Words {
  uint32_t word[4];
};

inline Words load_16(const void* p) {
  const simt::Block& block = simt::block();
  block.check(reinterpret_cast<uintptr_t>(p) % 16 == 0,
              "load_16: the address is no multiple of 16");
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

inline void store_16(void* p, const Words& words) {
  const simt::Block& block = simt::block();
  block.check(reinterpret_cast<uintptr_t>(p) % 16 == 0,
              "store_16: the address is no multiple of 16");
  std::memcpy(p, &words, sizeof(words));
}

inline bool has_mma() { return simt::block().options.compute_capability >= 80; }

inline void require(bool condition, const char* message) {
  simt::block().check(condition, message);
}

}  // namespace lora_ext::arch
