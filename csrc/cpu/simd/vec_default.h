// Vec and U32 in portable C++ (GCC and Clang vector types): any CPU, any architecture. See vec.h.
#pragma once

#include "types.h"

namespace lora_ext::LORA_EXT_ISA {

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  float result;
  if (magnitude < 0x0400u) {  // zero or denormal: magnitude * 2^-24
    result = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    const bool special = magnitude >= 0x7C00u;  // infinity or NaN keeps an all-ones exponent
    const uint32_t bits = (magnitude << 13) + (special ? (255u - 31u) << 23 : (127u - 15u) << 23);
    memcpy(&result, &bits, sizeof(result));
  }
  uint32_t bits;
  memcpy(&bits, &result, sizeof(bits));
  bits |= sign;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, BFloat16& out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  out.bits = value != value ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

inline void from_float(float value, Half& out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // denormal: let the addition of 0.5 round at 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    uint32_t sum;
    memcpy(&sum, &shifted, sizeof(sum));
    half = sum - 0x3F000000u;
  } else {
    half = (magnitude - ((127u - 15u) << 23) + 0x0FFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

inline float to_float(int8_t value) { return value; }

inline double to_float(double value) { return value; }
inline void from_float(double value, double& out) { out = value; }

template <class S>
struct Vec {
  static constexpr int kWidth = 16 / sizeof(S);
  typedef S Reg __attribute__((vector_size(16)));

  static Reg zero() { return Reg{}; }
  static Reg set1(S value) { return Reg{} + value; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg clamp(Reg a, S low, S high) {
    for (int i = 0; i < kWidth; ++i) a[i] = a[i] < low ? low : a[i] > high ? high : a[i];
    return a;
  }
  static Reg round(Reg a) { return a + S{0x1.8p23f} - S{0x1.8p23f}; }  // of a float below 2^22
  static Reg times_power(Reg a, Reg n) {
    for (int i = 0; i < kWidth; ++i) a[i] = __builtin_ldexpf(a[i], static_cast<int>(n[i]));
    return a;
  }
  static S sum(Reg a) {
    S total = 0;
    for (int i = 0; i < kWidth; ++i) total += a[i];
    return total;
  }
  static Reg keep(Reg a, uint32_t bits) {
    for (int i = 0; i < kWidth; ++i) a[i] = bits >> i & 1u ? a[i] : S{0};
    return a;
  }
  static bool all_finite(Reg a) {
    bool finite = true;
    for (int i = 0; i < kWidth; ++i) finite &= a[i] - a[i] == S{0};
    return finite;
  }

  template <class T>
  static Reg through(Reg a, T) {
    T room[kWidth];
    store(room, a);
    return load(room);
  }
  template <class T>
  static Reg through_number(Reg a, T type) {
    return through(a, type);
  }
  template <class T>
  static void store_exact(T* p, Reg a) {
    store(p, a);
  }

  template <class T>
  static Reg load(const T* p) {
    return load_partial(p, kWidth);
  }
  template <class T>
  static Reg load_partial(const T* p, int n) {
    Reg a{};
    for (int i = 0; i < n; ++i) a[i] = to_float(p[i]);
    return a;
  }
  template <class T>
  static void store(T* p, Reg a) {
    store_partial(p, a, kWidth);
  }
  template <class T>
  static void store_partial(T* p, Reg a, int n) {
    for (int i = 0; i < n; ++i) from_float(a[i], p[i]);
  }
};

struct Table16 {
  static constexpr int kRegisters = 4;
  Vec<float>::Reg values[kRegisters];

  Vec<float>::Reg lookup(const uint8_t* codes) const {
    Vec<float>::Reg found{};
    for (int i = 0; i < 4; ++i) found[i] = values[codes[i] / 4][codes[i] % 4];
    return found;
  }
  void lookup_both(const uint8_t* bytes, Vec<float>::Reg& low, Vec<float>::Reg& high) const {
    for (int i = 0; i < 4; ++i) {
      low[i] = values[bytes[i] % 16 / 4][bytes[i] % 4];
      high[i] = values[bytes[i] / 64][bytes[i] / 16 % 4];
    }
  }
};

struct U32 {
  using Reg = uint32_t;
  static constexpr int kWidth = 1;

  static Reg set1(uint32_t value) { return value; }
  static Reg iota(uint32_t base) { return base; }
  static Reg bit_xor(Reg a, Reg b, Reg c) { return a ^ b ^ c; }
  static void multiply(Reg a, uint32_t b, Reg& high, Reg& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
  static uint32_t low_half_below(Reg a, uint32_t threshold) { return (a & 0xFFFFu) < threshold; }
  static uint32_t high_half_below(Reg a, uint32_t threshold) { return (a >> 16) < threshold; }
};

}  // namespace lora_ext::LORA_EXT_ISA
