// Codes and numbers of blocks of a quantized matrix, as they are needed: a chunk of neighbours.
#pragma once

#include "../../quant/quantized_matrix.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

constexpr int64_t kCodeChunk = 1024;
// Codes of a chunk, which may begin and end within units, and what a vector reads beyond them.
constexpr int64_t kCodeRoom = kCodeChunk + 2 * 256 + 64;

// A value that is made here, in a register: compilers make one instruction of a product and a sum,
// which rounds once instead of twice, and load twice what is used twice.
template <class Reg>
inline Reg apart(Reg value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

// out[2 * size * units]: the low nibbles of `size` bytes, then their high ones.
template <int kSize>
inline void unpack_halves(const uint8_t* data, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; ++u) {
    for (int j = 0; j < kSize; ++j) {
      out[2 * kSize * u + j] = data[kSize * u + j] & 15;
      out[2 * kSize * u + kSize + j] = data[kSize * u + j] >> 4;
    }
  }
}

template <bool kHighFirst>
inline void unpack_pairs(const uint8_t* data, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t low = data[u] & 15, high = data[u] >> 4;
    out[2 * u] = kHighFirst ? high : low;
    out[2 * u + 1] = kHighFirst ? low : high;
  }
}

// 256 codes: four low bits in 128 bytes, then two high bits in 64; each half of the codes takes the
// low nibbles of 64 bytes, then the high ones, and the four pairs of bits of 32 bytes.
inline void unpack_q6_k(const uint8_t* data, int64_t units, uint8_t* out) {
  for (int64_t half = 0; half < 2 * units; ++half, out += 128) {
    const uint8_t* const unit = data + half / 2 * 192;
    const uint8_t *low = unit + half % 2 * 64, *high = unit + 128 + half % 2 * 32;
    for (int j = 0; j < 32; ++j) {
      out[j] = (low[j] & 15) | (high[j] & 3) << 4;
      out[32 + j] = (low[32 + j] & 15) | (high[j] & 12) << 2;
      out[64 + j] = low[j] >> 4 | (high[j] & 48);
      out[96 + j] = low[32 + j] >> 4 | (high[j] & 192) >> 2;
    }
  }
}

// The codes first <= i < first + count, a byte each; count up to kCodeChunk, room [kCodeRoom].
inline const uint8_t* codes_at(const QuantizedMatrix& W, int64_t first, int64_t count,
                               uint8_t* room) {
  const QuantUnit& unit = unit_of(W.packing);
  const int64_t begin = first >> unit.log2_codes,
                end = ((first + count - 1) >> unit.log2_codes) + 1;
  const uint8_t* data = W.codes + begin * unit.bytes;
  const int64_t units = end - begin;
  switch (W.packing) {
    case QuantPacking::Int8:
      return data;
    case QuantPacking::HighFirst:
      unpack_pairs<true>(data, units, room);
      break;
    case QuantPacking::LowFirst:
      unpack_pairs<false>(data, units, room);
      break;
    case QuantPacking::Halves16:
      unpack_halves<16>(data, units, room);
      break;
    case QuantPacking::Halves32:
      unpack_halves<32>(data, units, room);
      break;
    case QuantPacking::Q6K:
      unpack_q6_k(data, units, room);
      break;
  }
  return room + (first - begin * unit.codes);
}

// out[count] = in[count], as float
template <class T>
inline const float* widened(const void* in, int64_t first, int64_t count, float* out) {
  using V = Vec<float>;
  const T* p = static_cast<const T*>(in) + first;
  for (int64_t i = 0; i < count; i += V::kWidth) {
    const int lanes = static_cast<int>(at_most(count - i, V::kWidth));
    store_lanes<float>(out + i, load_lanes<float>(p + i, lanes), lanes);
  }
  return out;
}

inline const float* floats_at(const BlockNumbers& numbers, int64_t first, int64_t count,
                              float* room) {
  switch (numbers.type) {
    case QuantFloat::F16:
      return widened<Half>(numbers.values, first, count, room);
    case QuantFloat::BF16:
      return widened<BFloat16>(numbers.values, first, count, room);
    case QuantFloat::F32:
      break;
  }
  return static_cast<const float*>(numbers.values) + first;
}

// The numbers of blocks first <= b < first + count; room [count].
inline const float* numbers_at(const BlockNumbers& numbers, int64_t first, int64_t count,
                               float* room) {
  if (!numbers.codes) return floats_at(numbers, first, count, room);
  const uint8_t* codes = numbers.codes + first;
  for (int64_t b = 0; b < count;) {
    const int64_t shared = (first + b) / numbers.block_size;
    const int64_t end = at_most(count, (shared + 1) * numbers.block_size - first);
    float one;
    const float absmax = *floats_at(numbers, shared, 1, &one);
    for (; b < end; ++b) room[b] = numbers.codebook[codes[b]] * absmax;
  }
  if (numbers.has_offset) {
    asm volatile("" : : "r"(room) : "memory");  // see apart()
    for (int64_t b = 0; b < count; ++b) room[b] += numbers.offset;
  }
  return room;
}

}  // namespace lora_ext::LORA_EXT_ISA
