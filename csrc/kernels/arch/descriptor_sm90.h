// How wgmma finds its operands in shared memory. Host and device code.
#pragma once

#include "../../common/philox.h"  // LORA_EXT_HOST_DEVICE

namespace lora_ext::arch {

// How the 16-byte chunks of a tile are permuted: over spans of so many bytes. The values are those
// of the descriptor.
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// Which index of an operand is contiguous: the one that is summed over, or that of the result (rows
// of A, columns of B).
enum class Major : int { kK = 0, kMN = 1 };

// Bytes of a span.
LORA_EXT_HOST_DEVICE constexpr int swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : 256 >> static_cast<int>(swizzle);
}

// Where TMA puts, and wgmma looks for, the byte that without swizzle is at this address: the
// chunk's number within its span is combined with that of the 128 bytes.
LORA_EXT_HOST_DEVICE constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ (address >> 3 & static_cast<uint32_t>(swizzle_bytes(swizzle) - 16));
}

// The operand at `shared`. What the two distances (in bytes) mean, for W = swizzle_bytes:
//   kK, swizzled    a row is W bytes, rows follow each other; `stride` from 8 rows to the next 8;
//                   `leading` unused
//   kK, kNone       8 rows of 16 bytes follow each other; `leading` to the next 8 elements of k,
//                   `stride` to the next 8 rows
//   kMN, swizzled   a k is W bytes (W / 2 rows), 8 of them follow each other; `leading` to the next
//                   W / 2 rows, `stride` to the next 8 k
//   kMN, kNone      8 k of 16 bytes follow each other; `leading` to the next 8 k, `stride` to the
//                   next 8 rows
LORA_EXT_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading,
                                                         uint32_t stride, Swizzle swizzle) {
  return uint64_t{(shared & 0x3FFFFu) >> 4} | uint64_t{leading >> 4} << 16 |
         uint64_t{stride >> 4} << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The same operand so many bytes further, a multiple of 16: its address has 14 bits, in multiples
// of 16, of which no address of shared memory leaves any.
LORA_EXT_DEVICE uint64_t further(uint64_t descriptor, int bytes) {
  const auto low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes / 16);
  return (descriptor & 0xFFFFFFFF00000000u) | low;
}

}  // namespace lora_ext::arch
