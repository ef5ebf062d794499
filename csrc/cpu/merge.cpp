// merge_ on the CPU: a pass that only looks, then one that writes.
#include "ops/merge.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <atomic>

#include "cpu/backend.h"

namespace lora_ext {
namespace {

bool merge_rows(const MergeOperands& operands, const Tensor& weight_scale, double scaling,
                bool store) {
  const Tensor& weight = operands.weight;
  const int64_t N = weight.size(0), K = weight.size(1), r = operands.lora_A.size(0);
  const auto& kernels = cpu_kernels(weight.scalar_type(), operands.lora_A.scalar_type()).merge;
  const int64_t bytes = kernels.scratch_bytes(r);
  const void* scale = data_or_null(weight_scale);
  constexpr int64_t kMinRowsPerPart = 16;
  std::atomic<bool> finite{true};
  at::parallel_for(0, N, kMinRowsPerPart, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({bytes}, at::kByte);
    const bool ok = kernels.rows(
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

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("merge_", &merge_cpu); }

}  // namespace lora_ext
