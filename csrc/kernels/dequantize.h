// The values of a quantized matrix, by a kernel for any GPU: plain data, no CUDA headers.
#pragma once

#include "../quant/quantized_matrix.h"
#include "element.h"
#include "stream.h"

namespace lora_ext {

// Those of lora_ext.quant.QuantizedWeight.dequantize, to the bit.
template <class T>
struct DequantizeCall {
  QuantizedMatrix matrix;  // in memory of the GPU
  T* values;               // [N, K], at a multiple of 16 bytes
};
template <class T>
void dequantize(const DequantizeCall<T>& call, Stream stream);

}  // namespace lora_ext
