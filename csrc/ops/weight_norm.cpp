// weight_norm: schema, dispatcher handle, check, Meta kernel, and the composed form for devices
// without a kernel of their own.
#include "ops/weight_norm.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/merge.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

Tensor weight_norm_meta(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double) {
  check_weight_norm(weight, lora_A, lora_B);
  const auto compute = at::toOpMathType(weight.scalar_type());
  return weight.new_empty_symint({weight.sym_size(0)}, weight.options().dtype(compute));
}

// Operands that require grad are taken as they are; tangents are refused, not lost.
Tensor weight_norm_constant(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                            double scaling) {
  TORCH_CHECK_NOT_IMPLEMENTED(!have_tangents(weight, lora_A, lora_B),
                              "weight_norm: got a tangent of forward AD, expected none: lora_ext::"
                              "weight_norm is a constant; give it weight.detach()");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return weight_norm(weight, lora_A, lora_B, scaling);
}

}  // namespace

// Some rows at a time: never all of weight + scaling * B A.
Tensor weight_norm_composed(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                            double scaling) {
  constexpr int64_t kElements = int64_t{1} << 24;
  check_weight_norm(weight, lora_A, lora_B);
  const auto compute = at::toOpMathType(weight.scalar_type());
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(K, 1));
  const Tensor A = lora_A.to(compute);
  Tensor norm = at::empty({N}, weight.options().dtype(compute));
  for (int64_t n = 0; n < N; n += step) {
    const int64_t rows = std::min(step, N - n);
    const Tensor sum = at::addmm(weight.narrow(0, n, rows).to(compute),
                                 lora_B.narrow(0, n, rows).to(compute), A, 1, scaling);
    norm.narrow(0, n, rows).copy_(at::linalg_vector_norm(sum, 2, at::IntArrayRef{1}));
  }
  return norm;
}

void check_weight_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_merge("weight_norm", weight, lora_A, lora_B, std::nullopt);
}

Tensor weight_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                   double scaling) {
  static const Operator<&weight_norm> op("lora_ext::weight_norm");
  return op(weight, lora_A, lora_B, scaling);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling=1.0) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("weight_norm", &weight_norm_meta); }

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("weight_norm", &weight_norm_composed);
}

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("weight_norm", &weight_norm_constant); }

}  // namespace lora_ext
