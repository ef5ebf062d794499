// 16-bit storage types of the CUDA kernels, and how they become float and back. Rounding is to
// nearest even. Host and device code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LORA_EXT_DEVICE __device__ __forceinline__
#else
#define LORA_EXT_DEVICE inline
#endif

namespace lora_ext {

struct alignas(2) Bf16 {
  uint16_t bits;
};
struct alignas(2) Fp16 {
  uint16_t bits;
};

LORA_EXT_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

#if defined(__CUDACC__)

LORA_EXT_DEVICE float to_float(float value) { return value; }
LORA_EXT_DEVICE float to_float(Bf16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
LORA_EXT_DEVICE float to_float(Fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

LORA_EXT_DEVICE void from_float(float value, float& out) { out = value; }
LORA_EXT_DEVICE void from_float(float value, Bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
LORA_EXT_DEVICE void from_float(float value, Fp16& out) {
  out.bits = __half_as_ushort(__float2half_rn(value));
}

#else

LORA_EXT_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LORA_EXT_DEVICE float to_float(float value) { return value; }
LORA_EXT_DEVICE float to_float(Bf16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
LORA_EXT_DEVICE float to_float(Fp16 value) {
  _Float16 half;
  memcpy(&half, &value, sizeof(half));
  return static_cast<float>(half);
}

LORA_EXT_DEVICE void from_float(float value, float& out) { out = value; }
LORA_EXT_DEVICE void from_float(float value, Bf16& out) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = value != value;
  out.bits = nan ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
LORA_EXT_DEVICE void from_float(float value, Fp16& out) {
  const auto half = static_cast<_Float16>(value);
  memcpy(&out, &half, sizeof(half));
}

#endif

template <class T>
LORA_EXT_DEVICE T rounded(float value) {
  T out;
  from_float(value, out);
  return out;
}

// Two neighbours in one register, the first in the low half.
template <class T>
LORA_EXT_DEVICE uint32_t pack_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return uint32_t{rounded<T>(first).bits} | uint32_t{rounded<T>(second).bits} << 16;
#endif
}

template <class T>
LORA_EXT_DEVICE float first_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
LORA_EXT_DEVICE float second_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace lora_ext
