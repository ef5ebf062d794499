// The values of a quantized matrix. A thread makes eight neighbours, as they lie in memory, row
// after row: codes of 4 bits are one load of 4 bytes, values of 16 bits one store of 16.
#include "dequantize.h"
#include "elementwise.h"

namespace lora_ext {
namespace {

constexpr int kNeighbours =
    8;  // values of a thread; half a unit of more than two codes has a multiple of them

template <QuantPacking kPacking>
constexpr QuantUnit kUnitOf = unit_of(kPacking);  // device code may not call the function

// Of numbers that are not negative. One of 64 bits takes five times as many instructions.
LORA_EXT_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// `left` of kBytes bytes from `p` on, zeros after them. `aligned`: p is a multiple of 4.
template <int kBytes>
LORA_EXT_DEVICE void load_bytes(const uint8_t* p, int64_t left, bool aligned,
                                uint32_t (&words)[kBytes / 4]) {
  if (aligned && left >= kBytes) {
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) words[w] = reinterpret_cast<const uint32_t*>(p)[w];
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    const uint32_t byte = i < left ? p[i] : 0;
    words[i / 4] = (i % 4 == 0 ? 0 : words[i / 4]) | byte << i % 4 * 8;
  }
}
template <int kWords>
LORA_EXT_DEVICE uint32_t byte_of(const uint32_t (&words)[kWords], int i) {
  return words[i / 4] >> i % 4 * 8 & 0xFF;
}

// The codes of values `first`, a multiple of kNeighbours, and after it.
template <QuantPacking kPacking>
LORA_EXT_DEVICE void load_codes(const QuantizedMatrix& matrix, int64_t first, int64_t values,
                                uint32_t (&codes)[kNeighbours]) {
  constexpr QuantUnit kUnit = kUnitOf<kPacking>;
  const int64_t units = (values - 1) / kUnit.codes + 1;
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.codes) % 4 == 0;
  if constexpr (kUnit.codes <= 2) {  // one code after another
    constexpr int kBytes = kNeighbours / kUnit.codes;
    const int64_t byte = first / kUnit.codes;
    uint32_t words[kBytes / 4];
    load_bytes<kBytes>(matrix.codes + byte, units - byte, aligned, words);
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) {
      constexpr int kFirstShift = kPacking == QuantPacking::HighFirst ? 4 : 0;
      const uint32_t data = byte_of(words, e / kUnit.codes);
      codes[e] = kUnit.codes == 1 ? data : data >> (kFirstShift ^ e % 2 * 4) & 15;
    }
  } else {  // whole units; their first codes in the low nibbles, as many in the high ones
    constexpr int kHalf = kPacking == QuantPacking::Q6K ? 64 : kUnit.codes / 2;
    const int place = static_cast<int>(first % kUnit.codes);
    const uint8_t* const unit = matrix.codes + first / kUnit.codes * kUnit.bytes;
    const int part = place / (2 * kHalf), of_part = place % (2 * kHalf);
    uint32_t low[2], high[2] = {};
    load_bytes<kNeighbours>(unit + part * kHalf + of_part % kHalf, kNeighbours, aligned, low);
    if constexpr (kPacking == QuantPacking::Q6K) {  // and two more bits of each, four in a byte
      load_bytes<kNeighbours>(unit + 128 + part * 32 + of_part % 32, kNeighbours, aligned, high);
    }
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) {
      codes[e] = byte_of(low, e) >> (of_part < kHalf ? 0 : 4) & 15;
      if constexpr (kPacking == QuantPacking::Q6K) {
        codes[e] |= (byte_of(high, e) >> of_part / 32 * 2 & 3) << 4;
      }
    }
  }
}

LORA_EXT_DEVICE float number_at(const void* numbers, QuantFloat type, int64_t i) {
  if (type == QuantFloat::F32) return static_cast<const float*>(numbers)[i];
  if (type == QuantFloat::F16) return to_float(static_cast<const Fp16*>(numbers)[i]);
  return to_float(static_cast<const Bf16*>(numbers)[i]);
}

LORA_EXT_DEVICE float number_of(const BlockNumbers& numbers, int64_t block) {
  if (numbers.codes == nullptr) return number_at(numbers.values, numbers.type, block);
  const float absmax = number_at(numbers.values, numbers.type, quotient(block, numbers.block_size));
  const float number = arch::multiply_apart(numbers.codebook[numbers.codes[block]], absmax);
  return numbers.has_offset ? arch::add_apart(number, numbers.offset) : number;
}

LORA_EXT_DEVICE float rounded_to(QuantFloat type, float value) {
  if (type == QuantFloat::F32) return value;
  return type == QuantFloat::F16 ? to_float(rounded<Fp16>(value)) : to_float(rounded<Bf16>(value));
}

template <class T>
LORA_EXT_DEVICE void store_values(T* values, int64_t left, const float (&found)[kNeighbours]) {
  if (left < kNeighbours) {
#pragma unroll
    for (int e = 0; e < kNeighbours; ++e) {
      if (e < left) values[e] = rounded<T>(found[e]);
    }
    return;
  }
  constexpr int kVector = 16 / sizeof(T);
#pragma unroll
  for (int e = 0; e < kNeighbours; e += kVector) {
    arch::Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == sizeof(float)) {
        memcpy(&words.word[i], &found[e + i], sizeof(float));
      } else {
        words.word[i] = pack_pair<T>(found[2 * i], found[2 * i + 1]);
      }
    }
    arch::store_16(values + e, words);
  }
}

template <class T, QuantPacking kPacking>
__global__ void __launch_bounds__(kElementThreads)
    dequantize_kernel(const __grid_constant__ DequantizeCall<T> call) {
  constexpr int kBits = kUnitOf<kPacking>.bits;
  constexpr bool kNumbers = kPacking == QuantPacking::Int8;
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* const codebook = reinterpret_cast<float*>(shared);  // [2^kBits]
  const QuantizedMatrix& matrix = call.matrix;
  const int64_t first = element_index() * kNeighbours, values = matrix.N * matrix.K;
  if constexpr (!kNumbers) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < 1 << kBits) codebook[i] = matrix.codebook[i];
    __syncthreads();
  }
  if (first >= values) return;

  uint32_t codes[kNeighbours];
  load_codes<kPacking>(matrix, first, values, codes);
  int64_t block = quotient(first, matrix.block_size);
  int64_t left = (block + 1) * matrix.block_size - first;  // values up to the next block
  float scale = 0, zero_point = 0, shift = 0;
  const auto begin_block = [&] {
    scale = number_of(matrix.scales, block);
    if (matrix.zero_point != nullptr) zero_point = static_cast<float>(matrix.zero_point[block]);
    if (matrix.shift.values != nullptr) shift = number_of(matrix.shift, block);
  };
  begin_block();
  float found[kNeighbours];
#pragma unroll
  for (int e = 0; e < kNeighbours; ++e) {
    if (left == 0 && first + e < values) {
      ++block, left = matrix.block_size;
      begin_block();
    }
    --left;
    float value;
    if constexpr (kNumbers) {
      value = static_cast<float>(static_cast<int8_t>(codes[e]));
    } else {
      value = codebook[codes[e]];
    }
    if (matrix.zero_point != nullptr) value = arch::add_apart(value, -zero_point);
    value = arch::multiply_apart(value, scale);
    value = arch::multiply_apart(value, matrix.factor);
    if (matrix.shift.values != nullptr) value = arch::add_apart(value, shift);
    found[e] = rounded_to(matrix.rounding, value);
  }
  store_values(call.values + first, values - first, found);
}

template <class T, QuantPacking kPacking>
void launch_packing(const DequantizeCall<T>& call, Stream stream) {
  constexpr int kTable = kPacking == QuantPacking::Int8 ? 0 : 1 << kUnitOf<kPacking>.bits;
  launch_elements(dequantize_kernel<T, kPacking>,
                  ceil_div(call.matrix.N * call.matrix.K, kNeighbours), stream, call,
                  kTable * int{sizeof(float)});
}

}  // namespace

template <class T>
void dequantize(const DequantizeCall<T>& call, Stream stream) {
  switch (call.matrix.packing) {
    case QuantPacking::Int8:
      return launch_packing<T, QuantPacking::Int8>(call, stream);
    case QuantPacking::HighFirst:
      return launch_packing<T, QuantPacking::HighFirst>(call, stream);
    case QuantPacking::LowFirst:
      return launch_packing<T, QuantPacking::LowFirst>(call, stream);
    case QuantPacking::Halves16:
      return launch_packing<T, QuantPacking::Halves16>(call, stream);
    case QuantPacking::Halves32:
      return launch_packing<T, QuantPacking::Halves32>(call, stream);
    case QuantPacking::Q6K:
      return launch_packing<T, QuantPacking::Q6K>(call, stream);
  }
}

template void dequantize(const DequantizeCall<Bf16>&, Stream);
template void dequantize(const DequantizeCall<Fp16>&, Stream);
template void dequantize(const DequantizeCall<float>&, Stream);

}  // namespace lora_ext
