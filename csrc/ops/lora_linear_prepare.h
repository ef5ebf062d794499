// What the backends of lora_linear do alike before they choose a path: shapes, allocations, biases,
// and the gradients that no adapter is in. It leaves the low-rank part, which is written into y and
// dx; the base product is added to it afterwards.
#pragma once

#include "ops/lora_linear.h"

namespace lora_ext {

struct LowRankForward {
  Tensor x;       // [M, K], neighbouring columns adjacent
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  Tensor bias;    // [N] compute type: bias + scaling * lora_bias; or undefined
  HiddenScale scaling;
  LoraDropout dropout;
  Tensor y;  // [M, N], contiguous, written: scaling * dropout(x) A^T B^T + bias
  Tensor h;  // [M, r], contiguous, compute type, written: dropout(x) A^T; or undefined
};

struct LowRankBackward {
  Tensor dy;      // [M, N], neighbouring columns adjacent
  Tensor x;       // [M, K], neighbouring columns adjacent; or undefined
  Tensor h;       // [M, r], contiguous, compute type; or undefined
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  HiddenScale scaling;
  LoraDropout dropout;
  Tensor dx;  // [M, K], contiguous, written: dropout'(scaling * dy B A); or undefined
  Tensor dA;  // [r, K], contiguous, written; or undefined
  Tensor dB;  // [N, r], contiguous, written; or undefined
};

struct PreparedForward {
  Tensor y;                 // [..., N], to be written
  Tensor h;                 // [M, r] compute type, to be written; [0] if it is not wanted
  LowRankForward low_rank;  // into y and h
};
// Into y and h [M, r] where they are given.
PreparedForward lora_linear_prepare_fwd(const LoraLinearCall& call, bool return_h,
                                        const Tensor& y = {}, const Tensor& h = {});

struct PreparedBackward {
  Gradients gradients;       // dx, dA, dB to be written; dweight, dbias, dlora_bias are right
  LowRankBackward low_rank;  // into dx, dA and dB
  bool done;                 // nothing is left to write
};
// Into dx where it is given.
PreparedBackward lora_linear_prepare_bwd(const LoraLinearBackwardCall& call,
                                         const GradientMask& mask, const Tensor& dx = {});

// The same call with its scaling tensor read into the number.
template <class Call>
Call with_scaling_read(Call call) {
  call.scaling = call.scaling.read();
  return call;
}

}  // namespace lora_ext
