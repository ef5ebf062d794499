// merge_ on the CPU: a pass that only looks, then one that writes.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <atomic>

#include "cpu/backend.h"
#include "ops/checks.h"

namespace lora_ext {
namespace {

constexpr int64_t kMinRowsPerPart = 16;

bool merge_rows(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                double scaling, bool store) {
  const int64_t N = weight.size(0), K = weight.size(1), r = lora_A.size(0);
  const auto& kernels = cpu_kernels().merge[dtype_pair(weight.scalar_type(), lora_A.scalar_type())];
  const int64_t bytes = kernels.scratch_bytes(K, r);
  std::atomic<bool> finite{true};
  at::parallel_for(0, N, kMinRowsPerPart, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({bytes}, at::kByte);
    const bool ok = kernels.merge_rows(weight.data_ptr(), weight.stride(0), lora_A.const_data_ptr(),
                                       lora_B.const_data_ptr(), K, r, scaling, begin, end, store,
                                       scratch.data_ptr());
    if (!ok) finite = false;
  });
  return finite;
}

void merge_cpu(at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
               double scaling) {
  check_merge(weight, lora_A, lora_B);
  if (weight.numel() == 0) return;
  const MergeOperands operands = merge_operands(weight, lora_A, lora_B);
  check_merged_finite(merge_rows(operands.weight, operands.lora_A, operands.lora_B, scaling, false),
                      weight);
  merge_rows(operands.weight, operands.lora_A, operands.lora_B, scaling, true);
  // Whoever kept the weight for backward must hear that it changed.
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("merge_", &merge_cpu); }

}  // namespace lora_ext
