// The CPU's ways of lora_linear; lora_linear_path.h chooses between them and the BLAS calls of
// ops/.
#pragma once

#include <string>
#include <utility>

#include "cpu/lora_linear_kernels.h"
#include "cpu/lora_linear_path.h"
#include "ops/base_product.h"
#include "ops/lora_linear_prepare.h"

namespace lora_ext {

// Vector kernels: one pass over x, one over dy, dropout made in cache. They want the scaling
// without a tensor.
void low_rank_forward_fused(const LowRankForward& problem, const CpuPath& path);
void low_rank_backward_fused(const LowRankBackward& problem, const CpuPath& path);

// The way of a call with so many rows, and the vector kernels of one that has them; grouped: of one
// adapter of several.
CpuPath path_for(int64_t M, int64_t N, const Tensor& lora_A, at::ScalarType base, bool dropout,
                 bool grouped = false);
CpuPath path_for(int64_t M, int64_t N, int64_t K, int64_t r, at::ScalarType adapter,
                 at::ScalarType base, bool dropout, bool grouped = false);
const LoraLinearKernels& kernels_of(const CpuPath& path, const Tensor& base, const Tensor& adapter);

// On the way that lora_linear_path.h chooses.
void low_rank_forward(const LowRankForward& problem);
void low_rank_backward(const LowRankBackward& problem);

// Both parts, of any base; for backward it may be null where dx is not wanted.
std::tuple<Tensor, Tensor> lora_linear_fwd_prepared(PreparedForward prepared,
                                                    const BaseProduct& base);
Gradients lora_linear_bwd_prepared(const PreparedBackward& prepared, const BaseProduct* base);

// lora_linear_fwd and lora_linear_bwd of operands that were checked.
std::tuple<Tensor, Tensor> lora_linear_fwd_checked(const LoraLinearCall& call, bool return_h);
Gradients lora_linear_bwd_checked(const LoraLinearBackwardCall& call, GradientMask mask);
// The same, written into y, into h [M, r] where it is defined, and into dx where it is.
void lora_linear_fwd_into(const LoraLinearCall& call, const Tensor& y, const Tensor& h);
Gradients lora_linear_bwd_into(const LoraLinearBackwardCall& call, const GradientMask& mask,
                               const Tensor& dx);

// (path, reason) of a layer for so many rows; the base product's where it is not of a dense matrix.
std::pair<std::string, std::string> explain_lora_linear_cpu(
    int64_t tokens, int64_t out_features, const Tensor& lora_A, at::ScalarType base,
    double dropout_p, const std::optional<BasePath>& product = std::nullopt);

// Which way a call runs, for LORA_EXT_PRINT_PATHS.
void print_cpu_path(const LowRankForward& problem, const BaseProduct* base = nullptr);
void print_cpu_path(const LowRankBackward& problem, const BaseProduct* base = nullptr);

}  // namespace lora_ext
