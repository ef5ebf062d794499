// lora_linear_grouped as a torch::autograd::Function, under torch.autocast, and under torch.func's
// transforms.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/lora_linear_grouped.h"
#include "ops/lora_linear_grouped_composed.h"
#include "ops/lora_linear_grouped_stack.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& one) { return one.requires_grad(); });
}
bool any_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& one) { return has_tangent(one); });
}
bool requires_grad(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->requires_grad();
}

GroupedResults lora_linear_grouped_bwd_decomposed(const LoraLinearGroupedBackwardCall& call,
                                                  const GroupedMask& mask, at::IntArrayRef wanted);

GroupedResults part_bwd_decomposed(const BackwardPart& part, const GroupedMask& mask,
                                   at::IntArrayRef wanted) {
  if (part.is_base()) return base_part_gradients(part, mask);
  if (!part.is_lora_linear()) {
    return lora_linear_grouped_bwd_decomposed(part.grouped(), mask, wanted);
  }
  const TensorVector of =
      lora_linear_bwd_decomposed(part.lora_linear(), lora_linear_mask(mask, wanted[0]));
  return grouped_results(
      {of[kGradX], of[kGradWeight], of[kGradBias], of[kGradA], of[kGradB], of[kGradLoraBias]});
}

// The gradients out of differentiable operators, in the compute type.
GroupedResults lora_linear_grouped_bwd_decomposed(const LoraLinearGroupedBackwardCall& call,
                                                  const GroupedMask& mask, at::IntArrayRef wanted) {
  if (call.stacked()) return collect_gradients(call, mask, wanted, &part_bwd_decomposed);
  const auto compute = at::toOpMathType(call.dy.scalar_type());
  const Tensor dy = flattened(call.dy).to(compute);
  const Tensor x = call.x.has_value() ? flattened(*call.x).to(compute) : Tensor();
  const int64_t M = dy.size(0), K = call.lora_A[0].size(1);
  Tensor dx, dfactor, dweight, dbias;
  if (mask[kGroupedX]) dx = at::mm(dy, call.weight->to(compute));
  if (mask[kGroupedWeight]) dweight = at::mm(dy.t(), x).to(call.dy.scalar_type());
  if (mask[kGroupedBias]) dbias = dy.sum(0).to(call.dy.scalar_type());
  TensorVector dA, dB, dlora_bias, dfactors;
  size_t j = 0;
  for (const Slot& slot : slots_of(call.adapters())) {
    const SlotRows rows = rows_of(slot, x, M, K, call.order, call.factor, compute);
    Tensor h;
    if ((wanted[j] & kSlotB) || mask[kGroupedFactor]) {
      h = x.defined() ? slot_hidden(slot, rows)
                      : call.h->narrow(0, slot.h_begin, slot.rows * slot.rank())
                            .view({slot.rows, slot.rank()});
    }
    const auto own = slot_gradients(slot, rows, dy.index_select(0, rows.index), h, wanted[j],
                                    mask[kGroupedX], mask[kGroupedFactor]);
    if (mask[kGroupedX]) dx = dx.index_add(0, rows.index, own.dx);
    const auto cast = [&](const Tensor& gradient) {
      return gradient.defined() ? gradient.to(slot.dtype()) : gradient;
    };
    dA.push_back(cast(own.dA)), dB.push_back(cast(own.dB));
    dlora_bias.push_back(cast(own.dlora_bias)), dfactors.push_back(own.dfactor);
    ++j;
  }
  if (mask[kGroupedX]) {
    dx = dx.reshape_symint(with_width(call.dy, K)).to(call.dy.scalar_type());
  }
  if (mask[kGroupedFactor]) dfactor = at::cat(dfactors).to(call.factor->scalar_type());
  return {dx, dweight, dbias, dfactor, dA, dB, dlora_bias};
}

struct LoraLinearGrouped : torch::autograd::Function<LoraLinearGrouped> {
  static constexpr bool is_traceable = true;

  template <class... Fields>
  static Tensor forward(AutogradContext* ctx, const Fields&... fields) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LoraLinearGroupedCall call{fields...};
    const bool save_x = call.weight.requires_grad() || any_requires_grad(call.lora_A);
    // Whatever other slots are: gradients do not depend on them to the bit.
    const bool save_h = requires_grad(call.factor) || any_requires_grad(call.lora_B);
    auto [y, h] = lora_linear_grouped_fwd(call, save_h);
    variable_list saved = {save_x ? call.x : Tensor(),
                           save_h ? h : Tensor(),
                           call.x.requires_grad() ? call.weight : Tensor(),
                           call.order,
                           call.factor.value_or(Tensor()),
                           call.rng_state.value_or(Tensor())};
    for (const auto& list : {call.lora_A, call.lora_B, call.lora_bias}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["counts"] = call.counts.vec();
    ctx->saved_data["scaling"] = call.scaling.vec();
    ctx->saved_data["dropout_p"] = call.dropout_p.vec();
    ctx->saved_data["has_bias"] = call.bias.has_value();
    ctx->saved_data["rounds"] = call.rounds.vec();
    ctx->saved_data["weight_rows"] = call.weight_rows.vec();
    ctx->saved_data["weight_slots"] = call.weight_slots.vec();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor x = if_defined(saved[0]), h = if_defined(saved[1]),
                         weight = if_defined(saved[2]), factor = if_defined(saved[4]),
                         rng_state = if_defined(saved[5]);
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const auto scaling = ctx->saved_data["scaling"].toDoubleVector();
    const auto dropout_p = ctx->saved_data["dropout_p"].toDoubleVector();
    const auto rounds = ctx->saved_data["rounds"].toIntVector();
    const auto weight_rows = ctx->saved_data["weight_rows"].toIntVector();
    const auto weight_slots = ctx->saved_data["weight_slots"].toIntVector();
    const size_t slots = counts.size(), biases = saved.size() - 6 - 2 * slots;
    const at::TensorList lists = at::TensorList(saved).slice(6);
    const LoraLinearGroupedBackwardCall call{grad_outputs[0],
                                             x,
                                             h,
                                             weight,
                                             lists.slice(0, slots),
                                             lists.slice(slots, slots),
                                             lists.slice(2 * slots, biases),
                                             saved[3],
                                             counts,
                                             factor,
                                             scaling,
                                             dropout_p,
                                             rng_state,
                                             rounds,
                                             weight_rows,
                                             weight_slots};
    // needs_input_grad counts the tensors that were passed; None has no number.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    size_t input = 0;
    const auto next = [&](bool present) { return present && ctx->needs_input_grad(input++); };
    GroupedMask mask;
    mask[kGroupedX] = next(true);
    mask[kGroupedWeight] = next(true);
    mask[kGroupedBias] = next(has_bias);
    std::vector<int64_t> wanted(slots, 0);
    const auto want = [&](size_t j, SlotGradient gradient, bool exists) {
      if (next(true) && exists) wanted[j] |= gradient;
    };
    for (size_t j = 0; j < slots; ++j) want(j, kSlotA, true);
    for (size_t j = 0; j < slots; ++j) want(j, kSlotB, true);
    for (size_t j = 0; j < biases; ++j) want(j, kSlotBias, call.lora_bias[j].numel() > 0);
    next(true);  // order
    mask[kGroupedFactor] = next(factor.has_value());

    const bool differentiable = needs_differentiable_backward(call.dy);
    const bool reads_h = mask[kGroupedFactor] || std::any_of(wanted.begin(), wanted.end(),
                                                             [](auto w) { return w & kSlotB; });
    TORCH_CHECK(!(differentiable && at::GradMode::is_enabled() && reads_h && weight.has_value() &&
                  !x.has_value()),
                "lora_linear_grouped: double backward: x was not kept, since lora_A and weight are "
                "frozen; let lora_A require grad to differentiate twice");
    auto [dx, dweight, dbias, dfactor, dA, dB, dlora_bias] =
        differentiable ? lora_linear_grouped_bwd_decomposed(call, mask, wanted)
                       : lora_linear_grouped_bwd(call, mask, wanted);
    const auto kept = [](bool is_wanted, const Tensor& gradient) {
      return is_wanted ? gradient : Tensor();
    };
    variable_list grads = {kept(mask[kGroupedX], dx), kept(mask[kGroupedWeight], dweight),
                           kept(mask[kGroupedBias], dbias)};
    for (size_t j = 0; j < slots; ++j) grads.push_back(kept(wanted[j] & kSlotA, dA[j]));
    for (size_t j = 0; j < slots; ++j) grads.push_back(kept(wanted[j] & kSlotB, dB[j]));
    for (size_t j = 0; j < biases; ++j) {
      grads.push_back(kept(wanted[j] & kSlotBias, dlora_bias[j]));
    }
    grads.insert(grads.end(), 2, Tensor());  // order, counts
    grads.push_back(kept(mask[kGroupedFactor], dfactor));
    // scaling, dropout_p, rng_state, rounds, weight_rows, weight_slots
    grads.insert(grads.end(), 6, Tensor());
    return grads;
  }
};

// Out of ATen's operators, with their roundings (see transforms.h).
Tensor lora_linear_grouped_decomposed(const LoraLinearGroupedCall& call) {
  check_lora_linear_grouped(call);
  if (call.stacked()) return lora_linear_grouped_by_matrix(call);
  const Tensor x = flattened(call.x);
  const Tensor base = at::linear(call.x, call.weight, call.bias);
  Tensor y = flattened(base);
  for (const Slot& slot : slots_of(call.adapters())) {
    const SlotRows rows =
        rows_of(slot, x, x.size(0), x.size(1), call.order, call.factor, slot.dtype());
    const Tensor update = slot_update(slot, rows, slot_hidden(slot, rows));
    y = y.index_add(0, rows.index, update.to(y.scalar_type()));
  }
  return y.reshape_symint(base.sym_sizes());
}

Tensor lora_linear_grouped_autograd(const LoraLinearGroupedCall& call) {
  if (have_tangents(call.x, call.weight, call.bias, call.factor) || any_tangent(call.lora_A) ||
      any_tangent(call.lora_B) || any_tangent(call.lora_bias)) {
    return lora_linear_grouped_decomposed(call);
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (call.x.requires_grad() || call.weight.requires_grad() || requires_grad(call.bias) ||
       requires_grad(call.factor) || any_requires_grad(call.lora_A) ||
       any_requires_grad(call.lora_B) || any_requires_grad(call.lora_bias));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(lora_linear_grouped_fwd(call, false));
  }
  return std::apply([](const auto&... fields) { return LoraLinearGrouped::apply(fields...); },
                    call.fields());
}

// Under inference mode tensors carry no Autograd key.
Tensor lora_linear_grouped_inference(const LoraLinearGroupedCall& call) {
  return std::get<0>(lora_linear_grouped_fwd(call, false));
}

template <c10::DeviceType kDevice>
Tensor lora_linear_grouped_autocast(const LoraLinearGroupedCall& call) {
  if (call.stacked()) return lora_linear_grouped_by_matrix(call);  // casts no more than it uses
  const AutocastScope<kDevice> cast;
  const auto adapters = [&](at::TensorList list) {
    TensorVector result;
    for (const Tensor& one : list) result.push_back(cast.adapter(one));
    return result;
  };
  const TensorVector lora_A = adapters(call.lora_A), lora_B = adapters(call.lora_B),
                     lora_bias = adapters(call.lora_bias);
  return lora_linear_grouped({cast.base(call.x), cast.base(call.weight), cast.base(call.bias),
                              lora_A, lora_B, lora_bias, call.order, call.counts, call.factor,
                              call.scaling, call.dropout_p, call.rng_state, call.rounds,
                              call.weight_rows, call.weight_slots});
}

// torch.func's transforms come before autocast.
Tensor lora_linear_grouped_functorch(const LoraLinearGroupedCall& call) {
  const auto op = !is_autocast_on(call.x) ? &lora_linear_grouped_decomposed
                  : call.x.is_cuda()      ? &lora_linear_grouped_autocast<c10::DeviceType::CUDA>
                                          : &lora_linear_grouped_autocast<c10::DeviceType::CPU>;
  return op(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_grouped", flat<&lora_linear_grouped_autograd>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_grouped", flat<&lora_linear_grouped_inference>);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("lora_linear_grouped", flat<&lora_linear_grouped_functorch>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCPU, m) {
  m.impl("lora_linear_grouped", flat<&lora_linear_grouped_autocast<c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lora_ext, AutocastCUDA, m) {
  m.impl("lora_linear_grouped", flat<&lora_linear_grouped_autocast<c10::DeviceType::CUDA>>);
}

}  // namespace lora_ext
