// column_scale and its gradients, for operators that are made of them.
#pragma once

#include "ops/checks.h"

namespace lora_ext {

using ColumnScaleGradients = std::tuple<Tensor, Tensor, Tensor>;  // of z, scale, bias

// z [..., N] * scale [N] + bias [N]. Differentiable.
Tensor column_scale(const Tensor& z, const Tensor& scale, const OptionalTensor& bias);

// Gradients whose mask is false come back empty; z is needed for that of scale.
ColumnScaleGradients column_scale_bwd(const Tensor& dy, const OptionalTensor& z,
                                      const Tensor& scale, ColumnScaleMask mask);

}  // namespace lora_ext
