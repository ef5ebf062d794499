// Vec and U32 on AVX-512 (F, BW, DQ, VL). See vec.h for the interface.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace lora_ext::LORA_EXT_ISA {

template <class S>
struct Vec;

template <>
struct Vec<float> {
  using Reg = __m512;
  static constexpr int kWidth = 16;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float value) { return _mm512_set1_ps(value); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg clamp(Reg a, float low, float high) {
    return _mm512_min_ps(set1(high), _mm512_max_ps(set1(low), a));
  }
  static Reg round(Reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Reg times_power(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  static Reg keep(Reg a, uint32_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a);
  }
  static bool all_finite(Reg a) {
    return _mm512_fpclass_ps_mask(a, 0x99) == 0;  // quiet NaN, +inf, -inf, signalling NaN
  }

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(as_vector(p))); }
  static Reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(as_vector(p))); }
  static Reg load(const int8_t* p) {
    return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static Reg load_partial(const BFloat16* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static Reg load_partial(const Half* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static Reg load_partial(const int8_t* p, int n) {
    return widen_int8(_mm_maskz_loadu_epi8(first(n), p));
  }

  template <class T>
  static Reg through(Reg a, T) {
    return a;
  }
  static Reg through(Reg a, BFloat16) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(round_bf16(a), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static Reg through(Reg a, Half) { return _mm512_cvtph_ps(narrow_half(a)); }
  template <class T>
  static Reg through_number(Reg a, T type) {
    return through(a, type);
  }
  static Reg through_number(Reg a, BFloat16) {
    const __m512i bits = _mm512_castps_si512(a);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    const __m512i sum = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
    return _mm512_castsi512_ps(
        _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  template <class T>
  static void store_exact(T* p, Reg a) {
    store(p, a);
  }
  static void store_exact(BFloat16* p, Reg a) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    _mm256_storeu_si256(as_vector(p), _mm512_cvtepi32_epi16(high));
  }

  static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static void store(BFloat16* p, Reg a) { _mm256_storeu_si256(as_vector(p), narrow_bf16(a)); }
  static void store(Half* p, Reg a) { _mm256_storeu_si256(as_vector(p), narrow_half(a)); }
  static void store_partial(float* p, Reg a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static void store_partial(BFloat16* p, Reg a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a));
  }
  static void store_partial(Half* p, Reg a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_half(a));
  }

 private:
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  template <class T>
  static const __m256i* as_vector(const T* p) {
    return reinterpret_cast<const __m256i*>(p);
  }
  template <class T>
  static __m256i* as_vector(T* p) {
    return reinterpret_cast<__m256i*>(p);
  }
  static Reg widen_int8(__m128i numbers) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers));
  }
  static Reg widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m256i narrow_bf16(Reg a) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16));
  }
  // In the high halves, to nearest even by integer arithmetic: the AVX512_BF16 instruction flushes
  // denormals.
  static __m512i round_bf16(Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, bias), nan, _mm512_set1_epi32(0x7FC00000));
  }
  static __m256i narrow_half(Reg a) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
struct Vec<double> {
  using Reg = __m512d;
  static constexpr int kWidth = 8;

  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(double value) { return _mm512_set1_pd(value); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static double sum(Reg a) { return _mm512_reduce_add_pd(a); }
  static Reg keep(Reg a, uint32_t bits) {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), a);
  }
  static bool all_finite(Reg a) { return _mm512_fpclass_pd_mask(a, 0x99) == 0; }

  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static Reg load(const BFloat16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load(const Half* p) {
    return widen_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static Reg load_partial(const float* p, int n) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(n), p));
  }
  static Reg load_partial(const BFloat16* p, int n) {
    return widen_bf16(_mm_maskz_loadu_epi16(first(n), p));
  }
  static Reg load_partial(const Half* p, int n) {
    return widen_half(_mm_maskz_loadu_epi16(first(n), p));
  }
  static void store(double* p, Reg a) { _mm512_storeu_pd(p, a); }
  static void store_partial(double* p, Reg a, int n) { _mm512_mask_storeu_pd(p, first(n), a); }

 private:
  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static Reg widen_bf16(__m128i bits) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  static Reg widen_half(__m128i bits) { return _mm512_cvtps_pd(_mm256_cvtph_ps(bits)); }
};

struct Table16 {
  static constexpr int kRegisters = 1;
  __m512 values[kRegisters];

  __m512 lookup(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), values[0]);
  }
  void lookup_both(const uint8_t* bytes, __m512& low, __m512& high) const {
    const __m512i both =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    low = _mm512_permutexvar_ps(both, values[0]);  // which reads the low four bits
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values[0]);
  }
};

struct U32 {
  using Reg = __m512i;
  static constexpr int kWidth = 16;

  static Reg set1(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static Reg iota(uint32_t base) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(set1(base), lane);
  }
  static Reg bit_xor(Reg a, Reg b, Reg c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static void multiply(Reg a, uint32_t b, Reg& high, Reg& low) {
    const __m512i factor = set1(b);
    const __m512i even = _mm512_mul_epu32(a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
    low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
  }
  static uint32_t low_half_below(Reg a, uint32_t threshold) {
    const __m512i low = _mm512_and_si512(a, set1(0xFFFFu));
    return _mm512_cmplt_epu32_mask(low, set1(threshold));
  }
  static uint32_t high_half_below(Reg a, uint32_t threshold) {
    return _mm512_cmplt_epu32_mask(_mm512_srli_epi32(a, 16), set1(threshold));
  }
};

}  // namespace lora_ext::LORA_EXT_ISA
