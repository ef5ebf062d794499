// Drawing the state of the dropout generator, the mask that a state stands for, and dropout by it.
#pragma once

#include "ops/tensors.h"

namespace lora_ext {

// int64 [2] (seed, offset) on the device of `like`, drawn from that device's torch generator.
Tensor draw_rng_state(const Tensor& like);

// bool [rows, columns], true where dropout keeps: `rows` rows from `first_row` on.
Tensor dropout_mask(const Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                    double dropout_p, c10::SymInt first_row = 0);

// x [..., K] where its mask keeps, divided by 1 - dropout_p; else 0. Differentiable.
Tensor dropout(const Tensor& x, const Tensor& rng_state, double dropout_p);

void check_dropout_mask(const Tensor& rng_state, const c10::SymInt& rows,
                        const c10::SymInt& columns, double dropout_p, const c10::SymInt& first_row);
void check_dropout(const Tensor& x, const Tensor& rng_state, double dropout_p);

}  // namespace lora_ext
