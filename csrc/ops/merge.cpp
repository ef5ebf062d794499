// merge_, weight = weight_scale * weight + scaling * B A in place: schema and Meta kernel.
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
