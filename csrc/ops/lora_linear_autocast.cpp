// lora_linear under torch.autocast, and under torch.func's transforms.
#include <torch/library.h>

#include "ops/autocast.h"
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
  const AutocastScope<kDevice> cast;
  return lora_linear(cast.base(x), cast.base(weight), cast.base(bias), cast.adapter(lora_A),
                     cast.adapter(lora_B), cast.adapter(lora_bias),
                     {scaling, scaling_tensor, dropout_p, rng_state});
}

// torch.func's transforms come before autocast.
Tensor lora_linear_functorch(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const Tensor& lora_A, const Tensor& lora_B,
                             const OptionalTensor& lora_bias, double scaling,
                             const OptionalTensor& scaling_tensor, double dropout_p,
                             const OptionalTensor& rng_state) {
  const auto op = !is_autocast_on(x) ? &lora_linear_decomposed
                  : x.is_cuda()      ? &lora_linear_autocast<c10::DeviceType::CUDA>
                                     : &lora_linear_autocast<c10::DeviceType::CPU>;
  return op(x, weight, bias, lora_A, lora_B, lora_bias, scaling, scaling_tensor, dropout_p,
            rng_state);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_linear", &lora_linear_functorch);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear", &lora_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear", &lora_linear_autocast<c10::DeviceType::CUDA>);
}

}  // namespace lora_ext
