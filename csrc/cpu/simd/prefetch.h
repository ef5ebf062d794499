// Bringing memory into the cache ahead of its use.
#pragma once

namespace lora_ext::LORA_EXT_ISA {

constexpr int kCacheLine = 64;  // bytes

// What lies at p into the L2 cache; p may be past the end. Always inlined: gcc drops calls of
// functions that do nothing else.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lora_ext::LORA_EXT_ISA
