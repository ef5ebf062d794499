// Schema, checks and Meta kernel of merge_.
#include "ops/merge.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace lora_ext {
namespace {

void merge_meta(Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double,
                const OptionalTensor& weight_scale) {
  check_merge("merge_", weight, lora_A, lora_B, weight_scale);
}

}  // namespace

void check_merge(const char* op, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                 const OptionalTensor& weight_scale) {
  check_dense(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight: got shape ", weight.sym_sizes(),
                    ", expected [out_features, in_features]");
  check_adapters(op, "weight", weight, weight.sym_size(0), weight.sym_size(1), lora_A, lora_B);
  check_factor(op, "weight_scale", weight_scale, weight, weight.sym_size(0));
}

MergeOperands merge_operands(const char* op, const Tensor& weight, const Tensor& lora_A,
                             const Tensor& lora_B) {
  const bool transposed = weight.stride(1) != 1 && weight.size(1) != 1;
  const Tensor rows = transposed ? weight.t() : weight;
  const bool overlaps = rows.stride(0) < rows.size(1) && rows.size(0) > 1;
  TORCH_CHECK_VALUE((rows.stride(1) == 1 || rows.size(1) == 1) && !overlaps, op,
                    ": weight: got strides ", weight.strides(),
                    ", expected rows or columns of adjacent elements; call .contiguous()");
  return {rows, (transposed ? lora_B.t() : lora_A).contiguous(),
          (transposed ? lora_A.t() : lora_B).contiguous(), transposed};
}

void check_merged_finite(bool finite, const Tensor& weight) {
  TORCH_CHECK_VALUE(finite,
                    "merge_: the merged weight would hold NaN or Inf (in the weight, lora_A, "
                    "lora_B or by overflow of ",
                    dtype_name(weight.scalar_type()),
                    "), expected finite values; nothing was changed");
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "merge_(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling=1.0, "
      "Tensor? weight_scale=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("merge_", &merge_meta); }

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("merge_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
