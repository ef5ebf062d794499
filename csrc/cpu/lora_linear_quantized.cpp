// lora_linear_quantized on the CPU: what lora_linear is, onto another base product.
#include "ops/lora_linear_quantized.h"

#include <torch/library.h>

#include "cpu/lora_linear.h"
#include "cpu/quantized_product.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_quantized_fwd_cpu(const LoraLinearQuantizedCall& call,
                                                         bool return_h) {
  const QuantizedFields fields = check_lora_linear_quantized(call);
  return lora_linear_fwd_prepared(
      lora_linear_prepare_fwd(with_scaling_read(call.with(call.x)), return_h),
      QuantizedProduct(fields, call.x.scalar_type()));
}

QuantizedGradients lora_linear_quantized_bwd_cpu(const LoraLinearQuantizedBackwardCall& call,
                                                 QuantizedMask mask) {
  const auto fields = check_lora_linear_quantized_bwd(call, mask);
  const PreparedBackward prepared =
      lora_linear_prepare_bwd(with_scaling_read(call.with(kNoTensor)), with_weight(mask));
  if (!fields.has_value()) return without_weight(lora_linear_bwd_prepared(prepared, nullptr));
  const QuantizedProduct base(*fields, call.dy.scalar_type());
  return without_weight(lora_linear_bwd_prepared(prepared, &base));
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_quantized_fwd", flat<&lora_linear_quantized_fwd_cpu>);
  m.impl("lora_linear_quantized_bwd", flat<&lora_linear_quantized_bwd_cpu>);
}

}  // namespace lora_ext
