// dequantize: the matrix [N, K] of a quantized weight, in a floating-point dtype; to the bit
// lora_ext.quant.QuantizedWeight.dequantize. What devices call that have no product of codes.
#pragma once

#include "quant/quantized_weight.h"

namespace lora_ext {

// The operator, through the dispatcher.
Tensor dequantize(const QuantizedWeight& weight, at::ScalarType dtype);

QuantizedFields check_dequantize(const QuantizedWeight& weight, at::ScalarType dtype);

}  // namespace lora_ext
