// Vec and U32 on AVX2 with FMA and F16C. See vec.h for the interface.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace lora_ext::LORA_EXT_ISA {

template <class S>
struct Vec;

template <>
struct Vec<float> {
  using Reg = __m256;
  static constexpr int kWidth = 8;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float value) { return _mm256_set1_ps(value); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg clamp(Reg a, float low, float high) {
    return _mm256_min_ps(set1(high), _mm256_max_ps(set1(low), a));
  }
  static Reg round(Reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // In two steps, each of which a float can be.
  static Reg times_power(Reg a, Reg n) {
    const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
    return mul(mul(a, power(half)), power(_mm256_sub_epi32(all, half)));
  }
  static float sum(Reg a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Reg keep(Reg a, uint32_t bits) {
    const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), select);
    return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, select)));
  }
  static bool all_finite(Reg a) {
    const Reg zero_or_nan = _mm256_sub_ps(a, a);  // 0 where finite
    return _mm256_movemask_ps(_mm256_cmp_ps(zero_or_nan, zero(), _CMP_NEQ_UQ)) == 0;
  }

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(as_vector(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static Reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(as_vector(p))); }
  static Reg load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(as_vector(p))));
  }
  template <class T>
  static Reg through(Reg a, T) {
    return a;
  }
  static Reg through(Reg a, BFloat16) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(round_bf16(a), _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static Reg through(Reg a, Half) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static void store(BFloat16* p, Reg a) { store_high(p, round_bf16(a)); }
  template <class T>
  static Reg through_number(Reg a, T type) {
    return through(a, type);
  }
  template <class T>
  static void store_exact(T* p, Reg a) {
    store(p, a);
  }
  static void store_exact(BFloat16* p, Reg a) { store_high(p, _mm256_castps_si256(a)); }
  static void store(Half* p, Reg a) {
    _mm_storeu_si128(as_vector(p),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static Reg load_partial(const T* p, int n) {
    if (n == kWidth) return load(p);  // nearly always, and no call of memcpy
    T buffer[kWidth] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  template <class T>
  static void store_partial(T* p, Reg a, int n) {
    if (n == kWidth) return store(p, a);
    T buffer[kWidth];
    store(buffer, a);
    memcpy(p, buffer, n * sizeof(T));
  }

 private:
  static Reg power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // In the high halves, to nearest even; NaN becomes the quiet NaN.
  static __m256i round_bf16(Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_add_epi32(bits, bias), _mm256_set1_epi32(0x7FC00000), nan);
  }
  static void store_high(BFloat16* p, __m256i bits) {
    const __m256i words = _mm256_srli_epi32(bits, 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(as_vector(p), packed);
  }
  template <class T>
  static const __m128i* as_vector(const T* p) {
    return reinterpret_cast<const __m128i*>(p);
  }
  template <class T>
  static __m128i* as_vector(T* p) {
    return reinterpret_cast<__m128i*>(p);
  }
};

template <>
struct Vec<double> {
  using Reg = __m256d;
  static constexpr int kWidth = 4;

  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(double value) { return _mm256_set1_pd(value); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static double sum(Reg a) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static Reg keep(Reg a, uint32_t bits) {
    const __m256i select = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi64x(bits), select);
    return _mm256_and_pd(a, _mm256_castsi256_pd(_mm256_cmpeq_epi64(chosen, select)));
  }
  static bool all_finite(Reg a) {
    const Reg zero_or_nan = _mm256_sub_pd(a, a);
    return _mm256_movemask_pd(_mm256_cmp_pd(zero_or_nan, zero(), _CMP_NEQ_UQ)) == 0;
  }

  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static Reg load(const BFloat16* p) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
  }
  static Reg load(const Half* p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(double* p, Reg a) { _mm256_storeu_pd(p, a); }
  template <class T>
  static Reg load_partial(const T* p, int n) {
    if (n == kWidth) return load(p);  // nearly always, and no call of memcpy
    T buffer[kWidth] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  static void store_partial(double* p, Reg a, int n) {
    if (n == kWidth) return store(p, a);
    double buffer[kWidth];
    store(buffer, a);
    memcpy(p, buffer, n * sizeof(double));
  }
};

struct Table16 {
  static constexpr int kRegisters = 2;
  __m256 values[kRegisters];

  __m256 lookup(const uint8_t* codes) const { return lookup(load(codes)); }
  void lookup_both(const uint8_t* bytes, __m256& low, __m256& high) const {
    const __m256i both = load(bytes);
    low = lookup(both);
    high = lookup(_mm256_srli_epi32(both, 4));
  }

 private:
  static __m256i load(const uint8_t* bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  // Of the low four bits, of which a permutation reads three.
  __m256 lookup(__m256i index) const {
    const __m256 lower = _mm256_permutevar8x32_ps(values[0], index),
                 upper = _mm256_permutevar8x32_ps(values[1], index);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

struct U32 {
  using Reg = __m256i;
  static constexpr int kWidth = 8;

  static Reg set1(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static Reg iota(uint32_t base) {
    return _mm256_add_epi32(set1(base), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg bit_xor(Reg a, Reg b, Reg c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static void multiply(Reg a, uint32_t b, Reg& high, Reg& low) {
    const __m256i factor = set1(b);
    const __m256i even = _mm256_mul_epu32(a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  // Both halves are below 2^16, so the signed comparison is right.
  static uint32_t below(Reg half, uint32_t threshold) {
    const __m256i less = _mm256_cmpgt_epi32(set1(threshold), half);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(less)));
  }
  static uint32_t low_half_below(Reg a, uint32_t threshold) {
    return below(_mm256_and_si256(a, set1(0xFFFFu)), threshold);
  }
  static uint32_t high_half_below(Reg a, uint32_t threshold) {
    return below(_mm256_srli_epi32(a, 16), threshold);
  }
};

}  // namespace lora_ext::LORA_EXT_ISA
