// Instructions from sm_80 on, one function each.
#pragma once

#include "../element.h"
#include "fragments_sm80.h"

namespace lora_ext::arch {

// Address of a byte of shared memory, as instructions take it: a pointer of C++ says neither that
// it is of shared memory nor where that begins.
LORA_EXT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts to copy `bytes` (0 to 16) and to fill up to 16 with zero: past the registers and past L1,
// while the thread goes on, and what lies outside of a matrix needs no branch. Both addresses are
// multiples of 16; of `global` nothing beyond `bytes` is read.
LORA_EXT_DEVICE void cp_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

// What this thread has started since the last commit becomes a group, the unit that is waited for.
LORA_EXT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until no more than kGroups groups of this thread are unfinished. What other threads have
// copied is there after a barrier behind it.
template <int kGroups>
LORA_EXT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Four 8x8 matrices of 16-bit elements, one FragmentA or two FragmentB: plain loads would read them
// two bytes to a lane, and transposed not even pairs. Lane l gives the address of row l % 8 of
// matrix l / 8. Lane l receives elements (l / 4, 2 * (l % 4)) and its right neighbour of each, or
// of its transpose.
template <bool kTranspose>
LORA_EXT_DEVICE void ldmatrix_x4(uint32_t (&out)[4], uint32_t shared) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8] of a warp, 16-bit elements and sums in float: the largest
// product of tensor cores that all GPUs from sm_80 on have.
template <class T>
LORA_EXT_DEVICE void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b);

template <>
LORA_EXT_DEVICE void mma_m16n8k16<Bf16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
LORA_EXT_DEVICE void mma_m16n8k16<Fp16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lora_ext::arch
