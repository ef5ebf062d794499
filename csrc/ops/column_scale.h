// column_scale and its gradients, for operators that are made of them.
#pragma once

#include <array>
#include <tuple>

#include "ops/tensors.h"

namespace lora_ext {

// Positions in the gradients of `_bwd`.
enum ColumnScaleGradient { kGradZ, kGradScale, kGradOffset, kColumnScaleGradients };
using ColumnScaleMask = std::array<bool, kColumnScaleGradients>;
using ColumnScaleGradients = std::tuple<Tensor, Tensor, Tensor>;  // of z, scale, bias

// z [..., N] * scale [N] + bias [N]. Differentiable.
Tensor column_scale(const Tensor& z, const Tensor& scale, const OptionalTensor& bias);

// Gradients whose mask is false come back empty; z is needed for that of scale.
ColumnScaleGradients column_scale_bwd(const Tensor& dy, const OptionalTensor& z,
                                      const Tensor& scale, ColumnScaleMask mask);

// Out of ATen's operators, for what has no kernel: differentiable if the arguments are.
Tensor column_scale_composed(const Tensor& z, const Tensor& scale, const OptionalTensor& bias);
ColumnScaleGradients column_scale_bwd_composed(const Tensor& dy, const OptionalTensor& z,
                                               const Tensor& scale, ColumnScaleMask mask);

// `name` is what `op` calls z.
void check_column_scale(const char* op, const char* name, const Tensor& z, const Tensor& scale,
                        const OptionalTensor& bias);
void check_column_scale_bwd(const Tensor& dy, const OptionalTensor& z, const Tensor& scale,
                            const ColumnScaleMask& mask);

}  // namespace lora_ext
