// Matrix products by BLAS, rounded once. On a CPU without instructions for a 16-bit dtype ATen's
// take several times as long as those of float, in fp16 dozens of times, so that operands are
// widened for BLAS, block by block: neither matrix is ever copied as a whole.
#pragma once

#include <functional>

#include "ops/tensors.h"

namespace lora_ext {

Tensor product(const Tensor& a, const Tensor& b);                        // a [M, K] b [K, N]
void product_out(const Tensor& out, const Tensor& a, const Tensor& b);   // out = a b
void add_product_(const Tensor& out, const Tensor& a, const Tensor& b);  // out += a b
// x [..., K] weight [N, K]^T + bias [N]
Tensor linear_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = {});

// out = a b, or += it, of 16 bits widened to float block by block. fill(k, n, block) writes the
// block of b [K, N] that begins there, a float tensor of its size; where b is transposed its rows'
// elements are adjacent, else its columns'.
using FillBlock = std::function<void(int64_t k, int64_t n, const Tensor& block)>;
void product_of_widened_blocks(const Tensor& out, const Tensor& a, bool transposed, bool add,
                               const FillBlock& fill);

// Whether a CPU's operands are widened.
bool widens_product(int64_t M, int64_t N, int64_t K, at::ScalarType dtype);

}  // namespace lora_ext
