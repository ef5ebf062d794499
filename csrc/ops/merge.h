// merge_, weight = weight_scale * weight + scaling * B A in place: its checks, and its operands as
// kernels take them, for weight_norm too.
#pragma once

#include "ops/tensors.h"

namespace lora_ext {

void check_merge(const char* op, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                 const OptionalTensor& weight_scale);

// The operands of merge_ by rows: a transposed weight (fan_in_fan_out) is the same sum with the
// roles of A and B exchanged.
struct MergeOperands {
  Tensor weight;          // rows of adjacent elements that do not overlap
  Tensor lora_A, lora_B;  // contiguous
  bool transposed;        // rows of `weight` here are columns of what was given
};

MergeOperands merge_operands(const char* op, const Tensor& weight, const Tensor& lora_A,
                             const Tensor& lora_B);

void check_merged_finite(bool finite, const Tensor& weight);

}  // namespace lora_ext
