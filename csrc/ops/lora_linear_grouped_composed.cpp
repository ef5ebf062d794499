#include "ops/lora_linear_grouped_composed.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "ops/dropout.h"
#include "ops/lora_linear_grouped_stack.h"

namespace lora_ext {
namespace {

// factor * a b, rounded once
Tensor scaled_mm(const Tensor& a, const Tensor& b, double factor) {
  if (factor == 1.0) return at::mm(a, b);
  return at::addmm(at::zeros({1, 1}, a.options()), a, b, /*beta=*/0, /*alpha=*/factor);
}

Tensor times_factor(const Tensor& values, const SlotRows& rows) {
  return rows.factor.defined() ? values * rows.factor : values;
}

// out [M, columns] += values at these rows, in the wider of their types, rounded once
void add_to_rows(const Tensor& out, const Tensor& rows, const Tensor& values) {
  const Tensor sum = out.index_select(0, rows) + values;
  out.index_copy_(0, rows, sum.to(out.scalar_type()));
}

// A slot's part of h, or where it is to be written.
Tensor hidden_of(const Slot& slot, const Tensor& h) {
  return h.narrow(0, slot.h_begin, slot.rows * slot.rank()).view({slot.rows, slot.rank()});
}

}  // namespace

SlotRows rows_of(const Slot& slot, const Tensor& x, int64_t M, int64_t K, const Tensor& order,
                 const OptionalTensor& factor, at::ScalarType dtype) {
  SlotRows rows;
  rows.index = order.narrow(0, slot.begin, slot.rows).to(at::kLong);
  if (slot.dropout.enabled()) {
    rows.keep =
        dropout_mask(*slot.dropout.rng_state, M, K, slot.dropout.p).index_select(0, rows.index);
  }
  if (x.defined()) {
    rows.d = x.index_select(0, rows.index).to(dtype);
    if (rows.keep.defined()) rows.d = at::where(rows.keep, rows.d, at::zeros({}, rows.d.options()));
  }
  if (factor.has_value()) {
    rows.factor = factor->narrow(0, slot.begin, slot.rows).unsqueeze(1).to(dtype);
  }
  return rows;
}

Tensor slot_hidden(const Slot& slot, const SlotRows& rows) {
  return scaled_mm(rows.d, slot.lora_A.to(rows.d.scalar_type()).t(), slot.dropout.survivor());
}

Tensor slot_update(const Slot& slot, const SlotRows& rows, const Tensor& h) {
  const auto dtype = h.scalar_type();
  Tensor update = scaled_mm(times_factor(h, rows), slot.lora_B.to(dtype).t(), slot.scaling);
  if (slot.lora_bias.defined()) {
    update = update + times_factor((slot.lora_bias.to(dtype) * slot.scaling).unsqueeze(0), rows);
  }
  return update;
}

SlotGradients slot_gradients(const Slot& slot, const SlotRows& rows, const Tensor& dy,
                             const Tensor& h, int64_t wanted, bool dx, bool dfactor) {
  const auto dtype = dy.scalar_type();
  const Tensor A = slot.lora_A.to(dtype), B = slot.lora_B.to(dtype);
  const double scale = slot.scaling * slot.dropout.survivor();
  SlotGradients result;
  Tensor dh;  // without scaling and factor
  if (dx || (wanted & kSlotA)) dh = at::mm(dy, B);
  if (wanted & kSlotB) {
    result.dB = scaled_mm(dy.t(), times_factor(h.to(dtype), rows), slot.scaling);
  }
  if (wanted & kSlotA) result.dA = scaled_mm(times_factor(dh, rows).t(), rows.d, scale);
  if (wanted & kSlotBias) result.dlora_bias = times_factor(dy, rows).sum(0) * slot.scaling;
  if (dx) {
    result.dx = scaled_mm(times_factor(dh, rows), A, scale);
    if (rows.keep.defined()) result.dx = result.dx * rows.keep;
  }
  if (dfactor) {
    const auto compute = at::toOpMathType(dtype);  // a sum of few terms: each would show
    const Tensor wide = dy.to(compute);
    result.dfactor = (at::mm(wide, B.to(compute)) * h.to(compute)).sum(1);
    if (slot.lora_bias.defined()) {
      result.dfactor = result.dfactor + at::mv(wide, slot.lora_bias.to(compute));
    }
    result.dfactor = result.dfactor * slot.scaling;
  }
  return result;
}

void composed_slot_forward(const Slot& slot, const Tensor& x, const Tensor& order,
                           const OptionalTensor& factor, const Tensor& y, const Tensor& h) {
  if (slot.rows == 0) return;
  const SlotRows rows = rows_of(slot, x, x.size(0), x.size(1), order, factor, slot.dtype());
  const Tensor hidden = slot_hidden(slot, rows);
  if (h.defined()) hidden_of(slot, h).copy_(hidden);
  add_to_rows(y, rows.index, slot_update(slot, rows, hidden));
}

void composed_slot_backward(const Slot& slot, const Tensor& dy, const Tensor& x,
                            const OptionalTensor& h, const Tensor& order,
                            const OptionalTensor& factor, int64_t wanted, const Tensor& dx,
                            const Tensor& dA, const Tensor& dB, const Tensor& dlora_bias,
                            const Tensor& dfactor) {
  if (slot.rows == 0) {
    dA.zero_(), dB.zero_(), dlora_bias.zero_();
    return;
  }
  const bool reads_h = (wanted & kSlotB) || dfactor.defined();
  const bool reads_x = (wanted & kSlotA) || (reads_h && !h.has_value());
  Slot dropped = slot;
  if (!reads_x && !dx.defined()) dropped.dropout.p = 0.0;  // no mask for what nothing reads
  const SlotRows rows = rows_of(dropped, reads_x ? x : Tensor(), dy.size(0), slot.lora_A.size(1),
                                order, factor, slot.dtype());
  Tensor hidden;
  if (reads_h) {
    hidden = h.has_value() ? hidden_of(slot, *h) : slot_hidden(slot, rows);
  }
  const SlotGradients own =
      slot_gradients(slot, rows, dy.index_select(0, rows.index).to(slot.dtype()), hidden, wanted,
                     dx.defined(), dfactor.defined());
  if (wanted & kSlotA) dA.copy_(own.dA);
  if (wanted & kSlotB) dB.copy_(own.dB);
  if (wanted & kSlotBias) dlora_bias.copy_(own.dlora_bias);
  if (dx.defined()) add_to_rows(dx, rows.index, own.dx);
  if (dfactor.defined()) dfactor.narrow(0, slot.begin, slot.rows).copy_(own.dfactor);
}

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_composed(const LoraLinearGroupedCall& call,
                                                            bool return_h) {
  check_lora_linear_grouped(call);
  if (call.stacked()) return lora_linear_grouped_fwd_by_matrix(call, return_h);
  const Tensor x = as_rows(call.x);
  const int64_t M = x.size(0), N = call.weight.size(0);
  Tensor y = at::empty_symint(with_width(call.x, N), x.options());
  const Tensor y_rows = y.view({M, N});
  Tensor h = at::empty({return_h ? grouped_hidden_size(call.adapters()) : 0},
                       x.options().dtype(at::toOpMathType(x.scalar_type())));
  if (call.bias.has_value()) {
    y_rows.copy_(call.bias->expand({M, N}));
  } else {
    y_rows.zero_();
  }
  for (const Slot& slot : slots_of(call.adapters())) {
    composed_slot_forward(slot, x, call.order, call.factor, y_rows, return_h ? h : Tensor());
  }
  if (y.numel() > 0) add_base(y_rows, x, call.weight);
  return {y, h};
}

GroupedResults lora_linear_grouped_bwd_composed(const LoraLinearGroupedBackwardCall& call,
                                                GroupedMask mask, at::IntArrayRef wanted) {
  check_lora_linear_grouped_bwd(call, mask, wanted);
  if (call.stacked()) return lora_linear_grouped_bwd_by_matrix(call, mask, wanted);
  const Tensor dy = as_rows(call.dy), x = call.x.has_value() ? as_rows(*call.x) : Tensor();
  const int64_t M = dy.size(0), K = call.lora_A[0].size(1);
  Tensor dx = gradient_or_empty(mask[kGroupedX], call.dy, with_width(call.dy, K));
  if (mask[kGroupedX]) dx.zero_();
  const Tensor dx_rows = mask[kGroupedX] ? dx.view({M, K}) : Tensor();
  const Tensor dfactor =
      mask[kGroupedFactor] ? at::zeros_like(*call.factor) : at::empty({0}, dy.options());
  TensorVector dA, dB, dlora_bias;
  size_t j = 0;
  for (const Slot& slot : slots_of(call.adapters())) {
    dA.push_back(gradient_or_empty(wanted[j] & kSlotA, slot.lora_A));
    dB.push_back(gradient_or_empty(wanted[j] & kSlotB, slot.lora_B));
    dlora_bias.push_back(gradient_or_empty(wanted[j] & kSlotBias, slot.lora_B, dy.sym_size(1)));
    composed_slot_backward(slot, dy, x, call.h, call.order, call.factor, wanted[j], dx_rows, dA[j],
                           dB[j], dlora_bias[j], mask[kGroupedFactor] ? dfactor : Tensor());
    ++j;
  }
  if (mask[kGroupedX] && dx.numel() > 0) {
    add_base_gradient(dx_rows, dy, *call.weight);
  }
  auto [dweight, dbias] = base_gradients(dy, x, mask);
  return {dx, dweight, dbias, dfactor, dA, dB, dlora_bias};
}

std::pair<Tensor, Tensor> base_gradients(const Tensor& dy, const Tensor& x,
                                         const GroupedMask& mask) {
  const auto none = [&] { return at::empty({0}, dy.options()); };
  return {mask[kGroupedWeight] ? at::mm(dy.t(), x) : none(),
          mask[kGroupedBias]
              ? dy.sum(0, false, at::toOpMathType(dy.scalar_type())).to(dy.scalar_type())
              : none()};
}

}  // namespace lora_ext
