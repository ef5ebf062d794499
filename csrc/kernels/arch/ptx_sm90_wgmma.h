// wgmma: products of a warpgroup whose operands lie in shared memory. For sm_90a.
#pragma once

#include <type_traits>

#include "../element.h"
#include "descriptor_sm90.h"
#include "fragments_sm80.h"

namespace lora_ext::arch {

// Before the first wgmma of a group: it sees the registers as they are now.
LORA_EXT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// What the warpgroup has started since the last commit becomes a group.
LORA_EXT_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until no more than kGroups groups of this warpgroup are unfinished.
template <int kGroups>
LORA_EXT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}

// Before sums are read or changed by other means, after wgmma_wait; and before wgmma_fence where
// they were: the compiler, which knows nothing of products that run on, moves nothing of that
// across.
template <int kCount>
LORA_EXT_DEVICE void wgmma_fence_sums(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// PTX names every register of the sums, so each width is a text of its own. These put it together
// from the names and the operands of so many registers.
// clang-format off
#define LORA_EXT_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORA_EXT_TEXT_16 \
  LORA_EXT_TEXT_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LORA_EXT_TEXT_32 \
  LORA_EXT_TEXT_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23" ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_EXT_TEXT_64 \
  LORA_EXT_TEXT_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39" ", %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55" ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_EXT_TEXT_96 \
  LORA_EXT_TEXT_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71" ", %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87" ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LORA_EXT_TEXT_128 \
  LORA_EXT_TEXT_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LORA_EXT_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORA_EXT_SUMS_16(i) LORA_EXT_SUMS_8(i), LORA_EXT_SUMS_8(i + 8)
#define LORA_EXT_SUMS_32(i) LORA_EXT_SUMS_16(i), LORA_EXT_SUMS_16(i + 16)
#define LORA_EXT_SUMS_64(i) LORA_EXT_SUMS_32(i), LORA_EXT_SUMS_32(i + 32)
#define LORA_EXT_SUMS_96(i) LORA_EXT_SUMS_64(i), LORA_EXT_SUMS_32(i + 64)
#define LORA_EXT_SUMS_128(i) LORA_EXT_SUMS_64(i), LORA_EXT_SUMS_64(i + 64)

#define LORA_EXT_WGMMA_TEXT(N, TYPE, COUNT, OPERANDS, SCALE, MAJORS) \
  "{\n" \
  ".reg .pred p;\n" \
  "setp.ne.b32 p, %" #SCALE ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
  " {" LORA_EXT_TEXT_##COUNT "}, " OPERANDS ", p, 1, 1, " MAJORS ";\n" \
  "}\n"

// The numbers of the operands follow COUNT.
#define LORA_EXT_WGMMA_SHARED_TYPE(TYPE, N, COUNT, A, B, SCALE, MAJOR_A, MAJOR_B) \
  asm volatile(LORA_EXT_WGMMA_TEXT(N, TYPE, COUNT, "%" #A ", %" #B, SCALE, \
                                   "%" #MAJOR_A ", %" #MAJOR_B) \
               : LORA_EXT_SUMS_##COUNT(0) \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), \
                 "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB)) \
               : "memory")
#define LORA_EXT_WGMMA_REGISTERS_TYPE(TYPE, N, COUNT, A0, A1, A2, A3, B, SCALE, MAJOR_B) \
  asm volatile(LORA_EXT_WGMMA_TEXT(N, TYPE, COUNT, \
                                   "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B, SCALE, \
                                   "%" #MAJOR_B) \
               : LORA_EXT_SUMS_##COUNT(0) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)) \
               : "memory")

#define LORA_EXT_WGMMA_SHARED(N, ...) \
  if constexpr (kN == N && std::is_same_v<T, Bf16>) { \
    LORA_EXT_WGMMA_SHARED_TYPE("bf16", N, __VA_ARGS__); \
  } else if constexpr (kN == N) { \
    LORA_EXT_WGMMA_SHARED_TYPE("f16", N, __VA_ARGS__); \
  } static_assert(true)
#define LORA_EXT_WGMMA_REGISTERS(N, ...) \
  if constexpr (kN == N && std::is_same_v<T, Bf16>) { \
    LORA_EXT_WGMMA_REGISTERS_TYPE("bf16", N, __VA_ARGS__); \
  } else if constexpr (kN == N) { \
    LORA_EXT_WGMMA_REGISTERS_TYPE("f16", N, __VA_ARGS__); \
  } static_assert(true)
// clang-format on

template <class T, int kN>
inline constexpr bool kWgmmaExists =
    (std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>) &&
    (kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 192 || kN == 256);

// d [64, kN] (+)= A [64, 16] B [16, kN] of a warpgroup: 16-bit elements, sums in float. Both
// operands are named by wgmma_descriptor: it reads them from shared memory by itself and runs on,
// so that only sums take registers; tensor cores of sm_90 reach their rate with nothing else. In
// thread t, as FragmentC:
//   d[i]  row t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column i / 4 * 8 + 2 * (t % 4) + i % 2
template <class T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
LORA_EXT_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kWgmmaExists<T, kN>, "add the width below");
  LORA_EXT_WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12);
  LORA_EXT_WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20);
  LORA_EXT_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36);
  LORA_EXT_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68);
  LORA_EXT_WGMMA_SHARED(192, 96, 96, 97, 98, 99, 100);
  LORA_EXT_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132);
}

// The same with A in registers, a FragmentA of 16 rows in each warp.
template <class T, int kN, Major kMajorB = Major::kK>
LORA_EXT_DEVICE void wgmma(float (&d)[kN / 2], const FragmentA& a, uint64_t b, bool accumulate) {
  static_assert(kWgmmaExists<T, kN>, "add the width below");
  LORA_EXT_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13, 14);
  LORA_EXT_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22);
  LORA_EXT_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38);
  LORA_EXT_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70);
  LORA_EXT_WGMMA_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, 102);
  LORA_EXT_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134);
}

#undef LORA_EXT_WGMMA_REGISTERS
#undef LORA_EXT_WGMMA_SHARED
#undef LORA_EXT_WGMMA_REGISTERS_TYPE
#undef LORA_EXT_WGMMA_SHARED_TYPE
#undef LORA_EXT_WGMMA_TEXT

}  // namespace lora_ext::arch
