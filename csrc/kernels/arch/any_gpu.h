// What any GPU has: 16 bytes of a thread in one access, a check that ends all work of a program;
// and whether it has more.
#pragma once

#include <cstddef>

#include "../element.h"

// Of CUDA's device runtime: what assert() calls.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line,
                                        const char* function, size_t char_bytes);

namespace lora_ext::arch {

struct alignas(16) Words {
  uint32_t word[4];
};

// Of global memory, at a multiple of 16 bytes: one instruction instead of eight or four. In C++
// nvcc makes four of the store.
LORA_EXT_DEVICE Words load_16(const void* p) {
  const uint4 four = *static_cast<const uint4*>(p);
  return {{four.x, four.y, four.z, four.w}};
}
LORA_EXT_DEVICE void store_16(void* p, const Words& words) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"l"(p), "r"(words.word[0]),
               "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
               : "memory");
}

// Four of the eight bytes of `first` and `second`, chosen by four digits of 4 bits, the lowest
// one's byte first; of a digit of 8 and more, eight times the sign of byte (digit - 8).
LORA_EXT_DEVICE uint32_t permute_bytes(uint32_t first, uint32_t second, uint32_t digits) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(first), "r"(second), "r"(digits));
  return bytes;
}

// The sums of both halves, each modulo 2^16: one instruction from sm_90 on.
LORA_EXT_DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t sums;
  asm("add.u16x2 %0, %1, %2;\n" : "=r"(sums) : "r"(a), "r"(b));
  return sums;
#else
  return ((a & 0x7FFF7FFFu) + (b & 0x7FFF7FFFu)) ^ ((a ^ b) & 0x80008000u);
#endif
}

// A sum that is kept: nvcc adds a constant again in each turn of a loop, to save the register.
LORA_EXT_DEVICE uint32_t add_once(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm volatile("add.u32 %0, %1, %2;\n" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// A product, and a sum, that are rounded: nvcc makes one instruction of both, which rounds once.
LORA_EXT_DEVICE float multiply_apart(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;\n" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
LORA_EXT_DEVICE float add_apart(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;\n" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// Whether this code is for GPUs that have the instructions of ptx_sm80.h.
LORA_EXT_DEVICE constexpr bool has_mma() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return true;
#else
  return false;
#endif
}

// Where it is not so, all work of the program on the GPU ends and CUDA prints `what`, as with
// ATen's lookups: a kernel cannot throw. Not assert(), which release builds leave out.
LORA_EXT_DEVICE void require(bool condition, const char* what) {
  if (!condition) __assertfail(what, "lora_ext", 0, "", 1);
}

}  // namespace lora_ext::arch
