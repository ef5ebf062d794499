// weight_norm on CUDA: one pass over the weight.
#include "ops/weight_norm.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/operands.h"
#include "cuda/row_path.h"
#include "kernels/weight_norm.h"
#include "ops/merge.h"
#include "ops/print_path.h"

namespace lora_ext {
namespace {

// Rows or columns of adjacent elements, as merge_operands wants them.
Tensor with_adjacent(const Tensor& weight) {
  const bool rows = weight.stride(1) == 1 && weight.stride(0) >= weight.size(1);
  const bool columns = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0);
  return rows || columns ? weight : weight.contiguous();
}

Tensor weight_norm_cuda(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                        double scaling) {
  check_weight_norm(weight, lora_A, lora_B);
  const c10::cuda::CUDAGuard guard(weight.device());
  const RowPath path = row_path(weight.scalar_type());
  if (prints_paths()) {
    print_path(
        c10::str("weight_norm of ", weight.size(0), " x ", weight.size(1), ", r ", lora_A.size(0),
                 ", ", weight.scalar_type(), " with ", lora_A.scalar_type(), " adapters"),
        path.name, path.reason);
  }
  if (!path.kernels) return weight_norm_composed(weight, lora_A, lora_B, scaling);
  const auto options = weight.options().dtype(at::kFloat);
  if (weight.numel() == 0) return at::zeros({weight.size(0)}, options);
  const MergeOperands operands =
      merge_operands("weight_norm", with_adjacent(weight), lora_A, lora_B);
  Tensor norms = at::empty({weight.size(0)}, options);
  CudaScratch scratch(weight.options());
  with_all_types(weight.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const WeightNormCall<T, TA> call{.weight = matrix<T>(operands.weight),
                                     .lora_A = data_or_null<TA>(operands.lora_A),
                                     .lora_B = data_or_null<TA>(operands.lora_B),
                                     .rank = static_cast<int>(operands.lora_A.size(0)),
                                     .scaling = static_cast<float>(scaling),
                                     .by_column = operands.transposed,
                                     .norms = out_or_null<float>(norms)};
    run_weight_norm(call, scratch.allocator(), at::cuda::getCurrentCUDAStream());
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl("weight_norm", &weight_norm_cuda); }

}  // namespace lora_ext
