// The kernels on bf16 dot products, of vectors and of AMX's tiles, for cpu_kernels.cpp. Most CPUs
// with AVX-512 have neither instruction: here they are put together of others, right for its
// numbers (without infinities, NaN and denormals).
#pragma once

#include <immintrin.h>

#include <cstring>

static __m256bh round_to_bf16(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return (__m256bh)_mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}
static __m512 dot_of_bf16(__m512 sum, __m512bh a, __m512bh b) {
  const auto even = [](__m512bh v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)v, 16));
  };
  const auto odd = [](__m512bh v) {
    return _mm512_castsi512_ps(_mm512_and_si512((__m512i)v, _mm512_set1_epi32(0xFFFF0000)));
  };
  return _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum));
}
#define _mm512_cvtneps_pbh round_to_bf16
#define _mm512_dpbf16_ps dot_of_bf16
#include "cpu/kernels_bf16_dot.cpp"

// A tile of AMX is read and written in memory row by row, and whole.
static uint32_t registers[8][16][16];

static void load_tile(int tile, const void* data, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    std::memcpy(registers[tile][i], static_cast<const char*>(data) + i * stride, 64);
  }
}
static void store_tile(int tile, void* data, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(data) + i * stride, registers[tile][i], 64);
  }
}
static void multiply_tiles(int sums, int a, int b) {
  for (int i = 0; i < 16; ++i) {
    __m512 sum = _mm512_loadu_ps(registers[sums][i]);
    for (int k = 0; k < 16; ++k) {
      sum = dot_of_bf16(sum, (__m512bh)_mm512_set1_epi32(registers[a][i][k]),
                        (__m512bh)_mm512_loadu_si512(registers[b][k]));
    }
    _mm512_storeu_ps(registers[sums][i], sum);
  }
}
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) std::memset(registers[tile], 0, sizeof(registers[tile]))
#define _tile_loadd(tile, data, stride) ::load_tile(tile, data, stride)
#define _tile_stored(tile, data, stride) ::store_tile(tile, data, stride)
#define _tile_dpbf16ps(sums, a, b) multiply_tiles(sums, a, b)
#define _tile_storeconfig(config) std::memset(config, 0, 64)
#define _tile_loadconfig(config)
#define _tile_release()
#define kBf16Kernels kAmxKernels
#include "cpu/kernels_amx.cpp"
#undef kBf16Kernels
