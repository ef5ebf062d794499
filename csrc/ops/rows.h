// What backends do alike with shapes and biases.
#pragma once

#include <ATen/ATen.h>

#include "ops/lora_linear.h"

namespace lora_ext {

// [..., width] as [rows, width] with neighbouring columns adjacent; copies only if it must.
inline Tensor as_rows(const Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const Tensor flat = tensor.dim() == 2 ? tensor : tensor.reshape({rows, width});
  return flat.stride(1) == 1 || width == 1 ? flat : flat.contiguous();
}

// As a vector of adjacent elements of `dtype`; undefined if there is none.
inline Tensor as_vector(const OptionalTensor& vector, at::ScalarType dtype) {
  return vector.has_value() ? vector->to(dtype).contiguous() : Tensor();
}

inline double scaling_of(double scaling, const OptionalTensor& scaling_tensor) {
  return scaling_tensor.has_value() ? scaling * scaling_tensor->item<double>() : scaling;
}

// bias + scaling * lora_bias in `dtype`; undefined if there is neither.
inline Tensor total_bias(const OptionalTensor& bias, const OptionalTensor& lora_bias,
                         double scaling, at::ScalarType dtype) {
  Tensor total;
  if (bias.has_value()) total = bias->to(dtype);
  if (lora_bias.has_value()) {
    const Tensor scaled = lora_bias->to(dtype) * scaling;
    total = total.defined() ? total + scaled : scaled;
  }
  return total.defined() ? total.contiguous() : total;
}

}  // namespace lora_ext
