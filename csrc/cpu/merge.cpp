// merge_ on the CPU: a pass that only looks, then one that writes. And weight_norm, which looks at
// the same sums.
#include "ops/merge.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <atomic>

#include "cpu/backend.h"
#include "ops/weight_norm.h"

namespace lora_ext {
namespace {

constexpr int64_t kMinRowsPerPart = 16;

const MergeKernels& merge_kernels(const MergeOperands& operands) {
  return cpu_kernels()
      .merge[dtype_pair(operands.weight.scalar_type(), operands.lora_A.scalar_type())];
}

bool merge_rows(const MergeOperands& operands, const Tensor& weight_scale, double scaling,
                bool store) {
  const Tensor& weight = operands.weight;
  const int64_t N = weight.size(0), K = weight.size(1), r = operands.lora_A.size(0);
  const auto& kernels = merge_kernels(operands);
  const int64_t bytes = kernels.scratch_bytes(K, r);
  const void* scale = weight_scale.defined() ? weight_scale.const_data_ptr() : nullptr;
  std::atomic<bool> finite{true};
  at::parallel_for(0, N, kMinRowsPerPart, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({bytes}, at::kByte);
    const bool ok = kernels.merge_rows(
        weight.data_ptr(), weight.stride(0), operands.transposed ? nullptr : scale,
        operands.transposed ? scale : nullptr, operands.lora_A.const_data_ptr(),
        operands.lora_B.const_data_ptr(), K, r, scaling, begin, end, store, scratch.data_ptr());
    if (!ok) finite = false;
  });
  return finite;
}

void merge_cpu(Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
               const OptionalTensor& weight_scale) {
  check_merge("merge_", weight, lora_A, lora_B, weight_scale);
  if (weight.numel() == 0) return;
  const MergeOperands operands = merge_operands("merge_", weight, lora_A, lora_B);
  const Tensor scale = as_vector(weight_scale, at::toOpMathType(weight.scalar_type()));
  check_merged_finite(merge_rows(operands, scale, scaling, false), weight);
  merge_rows(operands, scale, scaling, true);
  // Whoever kept the weight for backward must hear that it changed.
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
}

Tensor weight_norm_cpu(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling) {
  check_weight_norm(weight, lora_A, lora_B);
  const auto options = weight.options().dtype(at::toOpMathType(weight.scalar_type()));
  if (weight.numel() == 0) return at::zeros({weight.size(0)}, options);
  const MergeOperands operands = merge_operands("weight_norm", weight, lora_A, lora_B);
  const int64_t rows = operands.weight.size(0), K = operands.weight.size(1);
  const int64_t r = operands.lora_A.size(0);
  // A part sums its own rows, or all columns over its rows.
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows / kMinRowsPerPart));
  Tensor sums =
      operands.transposed ? at::zeros({parts, K}, options) : at::zeros({1, rows}, options);
  const auto& kernels = merge_kernels(operands);
  const int64_t bytes = kernels.norm_scratch_bytes(r);
  parallel_parts(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    Tensor scratch = at::empty({bytes}, at::kByte);
    Tensor out = sums[operands.transposed ? part : 0];
    kernels.norm_rows(operands.weight.const_data_ptr(), operands.weight.stride(0),
                      operands.lora_A.const_data_ptr(), operands.lora_B.const_data_ptr(), K, r,
                      scaling, begin, end, operands.transposed, out.data_ptr(), scratch.data_ptr());
  });
  return sums.sum(0).sqrt_();
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("merge_", &merge_cpu);
  m.impl("weight_norm", &weight_norm_cpu);
}

}  // namespace lora_ext
