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

inline uint32_t permute_bytes(uint32_t first, uint32_t second, uint32_t digits) {
  const uint64_t both = uint64_t{second} << 32 | first;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = digits >> 4 * i & 15;
    const auto byte = static_cast<uint32_t>(both >> digit % 8 * 8 & 0xFF);
    bytes |= (digit < 8 ? byte : byte & 0x80 ? 0xFFu : 0u) << 8 * i;
  }
  return bytes;
}

inline uint32_t add_halves(uint32_t a, uint32_t b) {
  return ((a & 0x7FFF7FFFu) + (b & 0x7FFF7FFFu)) ^ ((a ^ b) & 0x80008000u);
}
inline uint32_t add_once(uint32_t a, uint32_t b) { return a + b; }

inline float multiply_apart(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float add_apart(float a, float b) { return a + b; }

inline bool has_mma() { return simt::block().options.compute_capability >= 80; }

inline void require(bool condition, const char* message) {
  simt::block().check(condition, message);
}

}  // namespace lora_ext::arch
