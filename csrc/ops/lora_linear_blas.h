// lora_linear out of ATen's products: BLAS calls, on any device and in any pair of dtypes, with the
// same dropout mask as the kernels. Nothing is read back from the device, so that a CUDA graph can
// capture a call.
#pragma once

#include "ops/lora_linear_prepare.h"

namespace lora_ext {

// out [rows, K] = x where the mask keeps, from its row first_row on, else 0; what is kept is not
// multiplied. x has rows of adjacent elements; out, which may be x, is contiguous.
using KeepRows = void(const Tensor& out, const Tensor& x, const Tensor& rng_state, double dropout_p,
                      int64_t first_row);

struct LowRankProducts {
  // Of the products, and of h and dh: that of lora_A unless it is given. x, dy, y and dx are copied
  // where they have another, x also under dropout.
  std::optional<at::ScalarType> dtype;
  // Of copies so many elements at a time; else all without dropout, with it 2^22.
  std::optional<int64_t> block_elements;
  KeepRows* keep_rows = nullptr;  // on this device; else by masks
};

// The low-rank part. A scaling tensor stays on its device.
void low_rank_forward_blas(const LowRankForward& problem, const LowRankProducts& products = {});
void low_rank_backward_blas(const LowRankBackward& problem, const LowRankProducts& products = {});

// All of lora_linear_fwd and lora_linear_bwd: a backend's way where it has no kernels.
std::tuple<Tensor, Tensor> lora_linear_fwd_composed(const LoraLinearCall& call, bool return_h);
Gradients lora_linear_bwd_composed(const LoraLinearBackwardCall& call, GradientMask mask);

}  // namespace lora_ext
