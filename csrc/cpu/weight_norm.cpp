// weight_norm on the CPU: the product of merge_, whose sums are squared instead of written.
#include "ops/weight_norm.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/backend.h"
#include "ops/merge.h"

namespace lora_ext {
namespace {

Tensor weight_norm_cpu(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling) {
  check_weight_norm(weight, lora_A, lora_B);
  const auto options = weight.options().dtype(at::toOpMathType(weight.scalar_type()));
  if (weight.numel() == 0) return at::zeros({weight.size(0)}, options);
  const MergeOperands operands = merge_operands("weight_norm", weight, lora_A, lora_B);
  const int64_t rows = operands.weight.size(0), K = operands.weight.size(1);
  const int64_t r = operands.lora_A.size(0);
  constexpr int64_t kMinRowsPerPart = 16;
  // A part sums its own rows, or all columns over its rows.
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows / kMinRowsPerPart));
  Tensor sums =
      operands.transposed ? at::zeros({parts, K}, options) : at::zeros({1, rows}, options);
  const auto& kernels =
      cpu_kernels(weight.scalar_type(), operands.lora_A.scalar_type()).weight_norm;
  const int64_t bytes = kernels.scratch_bytes(r);
  parallel_parts(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    Tensor scratch = at::empty({bytes}, at::kByte);
    Tensor out = sums[operands.transposed ? part : 0];
    kernels.rows(operands.weight.const_data_ptr(), operands.weight.stride(0),
                 operands.lora_A.const_data_ptr(), operands.lora_B.const_data_ptr(), K, r, scaling,
                 begin, end, operands.transposed, out.data_ptr(), scratch.data_ptr());
  });
  return sums.sum(0).sqrt_();
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("weight_norm", &weight_norm_cpu); }

}  // namespace lora_ext
