// A quantized matrix as plain data: lora_ext.quant.QuantizedWeight for kernels, which do not know
// torch. Its values, of block b = i / block_size, are
//
//   (codebook[code] - zero_point[b]) * scales[b] * factor + shift[b]
//
// in float, rounded after each operation, then to `rounding`, then to the type asked for.
#pragma once

#include <cstdint>

namespace lora_ext {

// How codes lie in bytes, in the order of PACKINGS (lora_ext/quant/packing.py). A unit is the least
// number of bytes that holds whole codes.
enum class QuantPacking { Int8, HighFirst, LowFirst, Halves16, Halves32, Q6K };
constexpr int kQuantPackings = 6;

struct QuantUnit {
  int bits;        // of a code
  int codes;       // of a unit, a power of two
  int log2_codes;  // which
  int bytes;       // of a unit
  bool may_split;  // the matrix may end within a unit
};
constexpr QuantUnit kQuantUnits[kQuantPackings] = {{8, 1, 0, 1, false},   {4, 2, 1, 1, true},
                                                   {4, 2, 1, 1, false},   {4, 32, 5, 16, false},
                                                   {4, 64, 6, 32, false}, {6, 256, 8, 192, false}};
constexpr const QuantUnit& unit_of(QuantPacking packing) {
  return kQuantUnits[static_cast<int>(packing)];
}

enum class QuantFloat { F32, F16, BF16 };
constexpr int kQuantFloats = 3;

// A number for each block: values[b], or, where they are quantized themselves,
// codebook[codes[b]] * values[b / block_size] + offset.
struct BlockNumbers {
  const void* values;  // of `type`; null: there are none
  QuantFloat type;
  const uint8_t* codes;   // [blocks]; null: values has a number for each block
  const float* codebook;  // [256]
  int64_t block_size;
  bool has_offset;
  float offset;
};

struct QuantizedMatrix {
  int64_t N, K;           // rows, and values of a row
  const uint8_t* codes;   // row by row, packed
  const float* codebook;  // [2^bits]; null: codes are numbers, int8
  QuantPacking packing;
  int64_t block_size;  // values that share a scale; a block may cross rows
  BlockNumbers scales, shift;
  const int8_t* zero_point;  // [blocks], or null for 0
  float factor;              // 1 for none
  QuantFloat rounding;
};

}  // namespace lora_ext
