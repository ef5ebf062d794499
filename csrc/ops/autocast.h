// How operands are cast under torch.autocast: the base product runs in the autocast dtype. fp32
// adapters stay as they are, since the kernels read them beside a bf16 or fp16 base at no cost.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>

#include "ops/tensors.h"

namespace lora_ext {

inline bool is_autocast_on(const Tensor& tensor) {
  return (tensor.is_cpu() || tensor.is_cuda()) &&
         at::autocast::is_autocast_enabled(tensor.device().type());
}

// Autocast is off while it lives.
// What several layers are, each list with an entry for each.
struct CastLists {
  TensorVector weight, bias, lora_A, lora_B, lora_bias;
  bool cast_x;  // of lora_linear_multi
};

template <c10::DeviceType kDevice>
struct AutocastScope {
  at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  c10::impl::ExcludeDispatchKeyGuard no_autocast{
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)};

  Tensor base(const Tensor& tensor) const {
    return at::autocast::cached_cast(dtype, tensor, kDevice);
  }
  OptionalTensor base(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor(base(*tensor)) : tensor;
  }
  Tensor adapter(const Tensor& tensor) const {
    return tensor.scalar_type() == at::kFloat ? tensor : base(tensor);
  }
  OptionalTensor adapter(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor(adapter(*tensor)) : tensor;
  }
  // Those of a call of layers that read one x. Where x's gradient is wanted in float32 the operator
  // casts x and adds up the parts of that, as autograd does those of a cast for each layer.
  CastLists lists(const auto& call) const {
    const auto each = [](at::TensorList list, const auto& cast) {
      TensorVector result;
      for (const Tensor& one : list) result.push_back(cast(one));
      return result;
    };
    const auto of_base = [&](const Tensor& one) { return base(one); };
    const auto of_adapter = [&](const Tensor& one) { return adapter(one); };
    CastLists own{each(call.weight, of_base),       each(call.bias, of_base),
                  each(call.lora_A, of_adapter),    each(call.lora_B, of_adapter),
                  each(call.lora_bias, of_adapter), false};
    own.cast_x = at::GradMode::is_enabled() && call.x.requires_grad() &&
                 call.x.scalar_type() == at::kFloat && dtype != at::kFloat && !own.weight.empty() &&
                 own.weight[0].scalar_type() == dtype;
    return own;
  }
};

}  // namespace lora_ext
