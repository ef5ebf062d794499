// lora_linear_grouped out of ATen's operators, slot after slot: on any device, and where it is
// differentiated or transformed in turn. Nothing is read back from the device.
#pragma once

#include "ops/lora_linear_grouped.h"

namespace lora_ext {

// What one slot's rows are made of, as differentiable tensors.
struct SlotRows {
  Tensor index;   // [rows], int64
  Tensor d;       // [rows, K], the elements of x that dropout keeps, in the products' dtype; where
                  // x is given
  Tensor keep;    // [rows, K], or undefined without dropout
  Tensor factor;  // [rows, 1] in the products' dtype, or undefined
};
SlotRows rows_of(const Slot& slot, const Tensor& x, int64_t M, int64_t K, const Tensor& order,
                 const OptionalTensor& factor, at::ScalarType dtype);

// h = dropout(x) A^T [rows, r], without factor
Tensor slot_hidden(const Slot& slot, const SlotRows& rows);
// scaling * factor * (h B^T + lora_bias) [rows, N], of h in the products' dtype
Tensor slot_update(const Slot& slot, const SlotRows& rows, const Tensor& h);

struct SlotGradients {
  Tensor dx;  // [rows, K]
  Tensor dA, dB, dlora_bias, dfactor;
};
// Those that are asked for. dy [rows, N], in the products' dtype; h in any, where dB or dfactor
// is.
SlotGradients slot_gradients(const Slot& slot, const SlotRows& rows, const Tensor& dy,
                             const Tensor& h, int64_t wanted, bool dx, bool dfactor);

// One slot's update, added to its rows of y [M, N]; and its part of h, if h is defined.
void composed_slot_forward(const Slot& slot, const Tensor& x, const Tensor& order,
                           const OptionalTensor& factor, const Tensor& y, const Tensor& h);
// What gradients there are for one slot: written into dA, dB and dlora_bias as `wanted` says, and
// where they are defined added to its rows of dx [M, K] and written to its entries of dfactor [R].
void composed_slot_backward(const Slot& slot, const Tensor& dy, const Tensor& x,
                            const OptionalTensor& h, const Tensor& order,
                            const OptionalTensor& factor, int64_t wanted, const Tensor& dx,
                            const Tensor& dA, const Tensor& dB, const Tensor& dlora_bias,
                            const Tensor& dfactor);

// y [M, N] += x [M, K] W^T, and dx += dy W: ATen's products, so that rows without adapter are those
// of torch.nn.functional.linear, bit for bit.
inline void add_base(const Tensor& y, const Tensor& x, const Tensor& weight) {
  y.addmm_(x, weight.t());
}
inline void add_base_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight) {
  dx.addmm_(dy, weight);
}

// (dweight, dbias) of rows dy [M, N] and x [M, K]; empty where they are not wanted.
std::pair<Tensor, Tensor> base_gradients(const Tensor& dy, const Tensor& x,
                                         const GroupedMask& mask);

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_composed(const LoraLinearGroupedCall& call,
                                                            bool return_h);
GroupedResults lora_linear_grouped_bwd_composed(const LoraLinearGroupedBackwardCall& call,
                                                GroupedMask mask, at::IntArrayRef wanted);

}  // namespace lora_ext
