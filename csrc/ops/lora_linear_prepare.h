// What the backends of lora_linear do alike before they choose a path: shapes, allocations, biases,
// and the gradients that no adapter is in.
#pragma once

#include "ops/lora_linear.h"
#include "ops/low_rank.h"

namespace lora_ext {

// [..., width] as [rows, width] with neighbouring columns adjacent; copies only if it must.
Tensor as_rows(const Tensor& tensor);

// As a vector of adjacent elements of `dtype`; undefined if there is none.
Tensor as_vector(const OptionalTensor& vector, at::ScalarType dtype);

// The same scale with the scaling tensor read into the number: on the CPU. On a GPU that would wait
// for the device, and break the capture of a CUDA graph.
LoraScale read_scaling(LoraScale scale);

struct PreparedForward {
  Tensor y;                 // [..., N], to be written
  Tensor h;                 // [M, r] compute type, to be written; [0] if it is not wanted
  LowRankForward low_rank;  // into y and h
};

PreparedForward prepare_forward(const Tensor& x,                  // [..., K]
                                const OptionalTensor& bias,       // [N]
                                const Tensor& lora_A,             // [r, K]
                                const Tensor& lora_B,             // [N, r]
                                const OptionalTensor& lora_bias,  // [N]
                                const LoraScale& scale, bool return_h);

struct PreparedBackward {
  Gradients gradients;       // dx, dA, dB to be written; dweight, dbias, dlora_bias are right
  LowRankBackward low_rank;  // into dx, dA and dB
  bool done;                 // nothing is left to write
};

PreparedBackward prepare_backward(const Tensor& dy,         // [..., N]
                                  const OptionalTensor& x,  // [..., K]
                                  const OptionalTensor& h,  // [M, r] compute type
                                  const Tensor& lora_A,     // [r, K]
                                  const Tensor& lora_B,     // [N, r]
                                  const LoraScale& scale, const GradientMask& mask);

}  // namespace lora_ext
