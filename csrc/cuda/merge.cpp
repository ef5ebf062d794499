// merge_ on CUDA: a pass that only looks, then one that writes.
#include "ops/merge.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "kernels/merge.h"

namespace lora_ext {
namespace {

template <class T, class TA>
void merge_typed(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                 double scaling, bool write, at::Tensor& finite) {
  const MergeCall<T, TA> call{static_cast<T*>(weight.data_ptr()),
                              weight.size(0),
                              weight.size(1),
                              weight.stride(0),
                              static_cast<const TA*>(lora_A.const_data_ptr()),
                              static_cast<const TA*>(lora_B.const_data_ptr()),
                              static_cast<int>(lora_A.size(0)),
                              static_cast<float>(scaling),
                              write,
                              finite.data_ptr<int>()};
  merge(call, at::cuda::getCurrentCUDAStream());
}

void merge_pass(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                bool write, at::Tensor& finite) {
  const auto base = weight.scalar_type();
  const bool mixed = A.scalar_type() == at::kFloat;
  if (base == at::kDouble) {  // rare: ATen's product, with a temporary
    const at::Tensor merged = at::addmm(weight, B, A, 1, scaling);
    if (write) {
      weight.copy_(merged);
    } else if (!at::isfinite(merged).all().item<bool>()) {
      finite.zero_();
    }
  } else if (base == at::kFloat) {
    merge_typed<float, float>(weight, A, B, scaling, write, finite);
  } else if (base == at::kBFloat16) {
    mixed ? merge_typed<Bf16, float>(weight, A, B, scaling, write, finite)
          : merge_typed<Bf16, Bf16>(weight, A, B, scaling, write, finite);
  } else {
    mixed ? merge_typed<Fp16, float>(weight, A, B, scaling, write, finite)
          : merge_typed<Fp16, Fp16>(weight, A, B, scaling, write, finite);
  }
}

// With weight_scale, which is rare (merging DoRA): ATen's product, with a temporary.
void merge_scaled(at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                  double scaling, const at::Tensor& weight_scale) {
  const auto compute = at::toOpMathType(weight.scalar_type());
  const at::Tensor scaled = weight.to(compute) * weight_scale.to(compute).unsqueeze(1);
  const at::Tensor merged = at::addmm(scaled, lora_B.to(compute), lora_A.to(compute), 1, scaling)
                                .to(weight.scalar_type());
  check_merged_finite(at::isfinite(merged).all().item<bool>(), weight);
  weight.copy_(merged);
}

void merge_cuda(at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                double scaling, const OptionalTensor& weight_scale) {
  check_merge("merge_", weight, lora_A, lora_B, weight_scale);
  if (weight.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(weight.device());
  if (weight_scale.has_value()) {
    merge_scaled(weight, lora_A, lora_B, scaling, *weight_scale);
    return;
  }
  const MergeOperands operands = merge_operands("merge_", weight, lora_A, lora_B);
  at::Tensor finite = at::ones({1}, weight.options().dtype(at::kInt));
  merge_pass(operands.weight, operands.lora_A, operands.lora_B, scaling, false, finite);
  check_merged_finite(finite.item<int>() != 0, weight);
  merge_pass(operands.weight, operands.lora_A, operands.lora_B, scaling, true, finite);
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl("merge_", &merge_cuda); }

}  // namespace lora_ext
