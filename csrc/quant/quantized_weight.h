// A quantized matrix as operators take it: tensors, and what is known of their layout. Made by
// lora_ext/quant/operator.py of a lora_ext.quant.QuantizedWeight.
#pragma once

#include <optional>

#include "ops/tensors.h"
#include "quant/quantized_matrix.h"

namespace lora_ext {

// Positions in `layout`.
enum QuantLayout {
  kQuantN,
  kQuantK,
  kQuantPacking,    // index of QuantPacking
  kQuantBlockSize,  // values that share a scale
  kQuantRounding,   // index of QuantFloat
  kQuantParts,      // which of the following there are: bits of QuantPart
  kQuantScalesBlock,
  kQuantShiftBlock,  // block sizes of nested numbers
  kQuantLayout
};
enum QuantPart {
  kHasCodebook = 1,
  kHasZeroPoint = 2,
  kHasShift = 4,
  kHasFactor = 8,
  kNestedScales = 16,
  kNestedShift = 32,
  kScalesOffset = 64,
  kShiftOffset = 128,
  kAllQuantParts = 255
};
// Positions in `numbers`, which has them all.
enum QuantNumber { kQuantFactor, kQuantScalesOffset, kQuantShiftOffset, kQuantNumbers };

// It lives no longer than what it was made of.
struct QuantizedWeight {
  // codes, codebook, scales, zero_point, shift: those that there are. Nested scales and shifts are
  // three: codes, codebook, absmax.
  at::TensorList tensors;
  at::IntArrayRef layout;
  at::ArrayRef<double> numbers;
};

// Numbers of blocks, see BlockNumbers.
struct BlockTensors {
  Tensor values;  // undefined: there are none
  Tensor codes, codebook;
  int64_t block_size = 0;
  std::optional<double> offset;
};

// The same, each tensor by its name.
struct QuantizedFields {
  int64_t N, K, block_size;
  QuantPacking packing;
  QuantFloat rounding;
  Tensor codes, codebook, zero_point;  // undefined where there is none
  BlockTensors scales, shift;
  std::optional<double> factor;

  int64_t blocks() const { return (N * K - 1) / block_size + 1; }
};

// ValueError, TypeError or RuntimeError for what does not describe a matrix, in memory of the
// input's device.
QuantizedFields checked_fields(const char* op, const QuantizedWeight& weight, const Tensor& x);
// (N, K) of a weight whose tensors may be left out.
std::pair<int64_t, int64_t> checked_shape(const char* op, const QuantizedWeight& weight);

// For kernels; it lives no longer than the tensors.
QuantizedMatrix matrix_of(const QuantizedFields& fields);

// The matrix [N, K], out of ATen's operators: on any device.
Tensor dequantized(const QuantizedFields& fields, at::ScalarType dtype);

}  // namespace lora_ext
