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
  // Of an x that several layers read the parts of the gradient are added up in its own type, as
  // autograd adds up those of a cast for each: cast_x of lora_linear_multi. weight is cast.
  bool adds_up_gradient(const Tensor& x, at::TensorList weight) const {
    return at::GradMode::is_enabled() && x.requires_grad() && x.scalar_type() == at::kFloat &&
           dtype != at::kFloat && !weight.empty() && weight[0].scalar_type() == dtype;
  }
  TensorVector bases(at::TensorList list) const {
    TensorVector result;
    for (const Tensor& one : list) result.push_back(base(one));
    return result;
  }
  TensorVector adapters(at::TensorList list) const {
    TensorVector result;
    for (const Tensor& one : list) result.push_back(adapter(one));
    return result;
  }
};

}  // namespace lora_ext
