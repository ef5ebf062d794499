// The low-rank part of lora_linear on the CPU, in two ways that path.h chooses between. Both write
// into y and dx what the base product is then added to.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/path.h"

namespace lora_ext {

using at::Tensor;

struct LowRankForward {
  Tensor x;       // [M, K], neighbouring columns adjacent
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  Tensor bias;    // [N] compute type: bias + scaling * lora_bias; or undefined
  double scaling;
  DropoutArgs dropout;
  Tensor y;  // [M, N], contiguous, written: scaling * dropout(x) A^T B^T + bias
  Tensor h;  // [M, r], contiguous, compute type, written: dropout(x) A^T; or undefined
};

struct LowRankBackward {
  Tensor dy;      // [M, N], neighbouring columns adjacent
  Tensor x;       // [M, K], neighbouring columns adjacent; or undefined
  Tensor h;       // [M, r], contiguous, compute type; or undefined
  Tensor lora_A;  // [r, K], contiguous
  Tensor lora_B;  // [N, r], contiguous
  double scaling;
  DropoutArgs dropout;
  Tensor dx;  // [M, K], contiguous, written: dropout'(scaling * dy B A); or undefined
  Tensor dA;  // [r, K], contiguous, written; or undefined
  Tensor dB;  // [N, r], contiguous, written; or undefined
};

// Vector kernels: one pass over x, one over dy, dropout made in cache.
void low_rank_forward_fused(const LowRankForward& problem, const CpuPath& path);
void low_rank_backward_fused(const LowRankBackward& problem, const CpuPath& path);

// BLAS calls, for one dtype; dropout on a copy of x that passes with the call.
void low_rank_forward_blas(const LowRankForward& problem);
void low_rank_backward_blas(const LowRankBackward& problem);

// (path, reason) of a layer for so many rows.
std::pair<std::string, std::string> explain_lora_linear_cpu(int64_t tokens, int64_t out_features,
                                                            const Tensor& lora_A,
                                                            at::ScalarType base, double dropout_p);

// Whether ATen's BLAS has a fast product for this dtype on this CPU.
bool has_fast_blas(at::ScalarType dtype);

}  // namespace lora_ext
