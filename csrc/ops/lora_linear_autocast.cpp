// lora_linear under torch.autocast: the base product runs in the autocast dtype. fp32 adapters stay
// as they are, since the kernels read them beside a bf16 or fp16 base at no cost.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/lora_linear.h"
#include "ops/lora_linear_registration.h"

namespace lora_ext {
namespace {

template <c10::DeviceType kDevice>
Tensor lora_linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& lora_A, const Tensor& lora_B,
                            const OptionalTensor& lora_bias, double scaling,
                            const OptionalTensor& scaling_tensor, double dropout_p,
                            const OptionalTensor& rng_state) {
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, kDevice);
  };
  const auto cast_adapter = [&](const Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat ? tensor : cast(tensor);
  };
  const auto cast_optional = [](const OptionalTensor& tensor, const auto& how) {
    return tensor.has_value() ? OptionalTensor(how(*tensor)) : tensor;
  };
  return lora_linear(cast(x), cast(weight), cast_optional(bias, cast), cast_adapter(lora_A),
                     cast_adapter(lora_B), cast_optional(lora_bias, cast_adapter),
                     {scaling, scaling_tensor, dropout_p, rng_state});
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear", &lora_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear", &lora_linear_autocast<c10::DeviceType::CUDA>);
}

}  // namespace lora_ext
