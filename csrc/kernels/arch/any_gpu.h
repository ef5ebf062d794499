// What any GPU has: 16 bytes of a thread in one access, and a check that ends all work of a
// program.
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

// Of an address that is a multiple of 16, in one instruction instead of eight or four.
LORA_EXT_DEVICE Words load_16(const void* p) { return *static_cast<const Words*>(p); }
LORA_EXT_DEVICE void store_16(void* p, const Words& words) { *static_cast<Words*>(p) = words; }

// Where it is not so, all work of the program on the GPU ends and CUDA prints `what`, as with
// ATen's lookups: a kernel cannot throw. Not assert(), which release builds leave out.
LORA_EXT_DEVICE void require(bool condition, const char* what) {
  if (!condition) __assertfail(what, "lora_ext", 0, "", 1);
}

}  // namespace lora_ext::arch
