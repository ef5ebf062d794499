// merge_, weight += scaling * B A in place: schema and Meta kernel.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace lora_ext {
namespace {

void merge_meta(at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double) {
  check_merge(weight, lora_A, lora_B);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("merge_(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling=1.0) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("merge_", &merge_meta); }

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("merge_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
