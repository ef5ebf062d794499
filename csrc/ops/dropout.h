// Drawing the state of the dropout generator, and the mask that a state stands for.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext {

// int64 [2] (seed, offset) on the device of `like`, drawn from that device's torch generator.
at::Tensor draw_rng_state(const at::Tensor& like);

// bool [rows, columns], true where dropout keeps: `rows` rows from `first_row` on.
at::Tensor dropout_mask(const at::Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                        double dropout_p, c10::SymInt first_row = 0);

// x [..., K] where its mask keeps, divided by 1 - dropout_p; else 0. Differentiable.
at::Tensor dropout(const at::Tensor& x, const at::Tensor& rng_state, double dropout_p);

}  // namespace lora_ext
