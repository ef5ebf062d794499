#include "ops/lora_linear_grouped_stack.h"

#include <ATen/ATen.h>

#include <numeric>

#include "ops/lora_linear_grouped_composed.h"

namespace lora_ext {
namespace {

int64_t sum(at::IntArrayRef numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{0});
}

// fill(part) adds what is not the slots'.
template <class Part, class Call, class F>
std::vector<Part> split(const Call& call, const F& fill) {
  std::vector<Part> parts;
  int64_t begin = 0, slot = 0, entry = 0, h_begin = 0;
  for (size_t matrix = 0; matrix < call.weight_rows.size(); ++matrix) {
    const int64_t rows = call.weight_rows[matrix], slots = call.weight_slots[matrix];
    Part part{};
    part.matrix = static_cast<int64_t>(matrix);
    part.begin = begin, part.rows = rows, part.slot = slot, part.h_begin = h_begin;
    part.lora_A = call.lora_A.slice(slot, slots), part.lora_B = call.lora_B.slice(slot, slots);
    if (!call.lora_bias.empty()) part.lora_biases = call.lora_bias.slice(slot, slots);
    part.counts = call.counts.slice(slot, slots), part.scaling = call.scaling.slice(slot, slots);
    part.dropout_p = call.dropout_p.slice(slot, slots), part.rng_state = call.rng_state;
    for (int64_t j = 0; j < slots; ++j) part.h_size += part.counts[j] * part.lora_A[j].size(0);
    const int64_t entries = sum(part.counts);
    if (rows > 0) {
      part.order = call.order.narrow(0, entry, entries);
      if (call.factor.has_value()) part.factor = call.factor->narrow(0, entry, entries);
      if (slots == 1 && !part.lora_biases.empty() && part.lora_biases[0].numel() > 0) {
        part.lora_bias = part.lora_biases[0];
      }
      fill(part);
      parts.push_back(std::move(part));
    }
    begin += rows, slot += slots, entry += entries, h_begin += part.h_size;
  }
  return parts;
}

size_t matrices_of(const Tensor& stack) { return stack.sym_size(0).guard_int(__FILE__, __LINE__); }

template <class Call>
void check_parts(const char* op, const Call& call, const Tensor& x, size_t matrices) {
  const at::IntArrayRef rows = call.weight_rows, slots = call.weight_slots;
  if (!call.stacked()) {
    TORCH_CHECK_VALUE(rows.empty() && slots.empty(), op, ": weight_rows: got ", rows.size(),
                      " numbers, and weight_slots ", slots.size(),
                      ", expected none with a weight of two dimensions");
    return;
  }
  TORCH_CHECK_VALUE(rows.size() == matrices, op, ": weight_rows: got ", rows.size(),
                    " numbers, expected ", matrices, ", one for each matrix of weight");
  TORCH_CHECK_VALUE(slots.size() == matrices, op, ": weight_slots: got ", slots.size(),
                    " numbers, expected ", matrices, ", one for each matrix of weight");
  TORCH_CHECK_VALUE(call.rounds.empty(), op, ": rounds: got ", call.rounds.size(),
                    " numbers with a stack of weights, expected none: a row is in one slot");
  size_t slot = 0;
  for (size_t matrix = 0; matrix < matrices; ++matrix) {
    TORCH_CHECK_VALUE(rows[matrix] >= 0, op, ": weight_rows: got ", rows[matrix],
                      ", expected numbers of rows");
    TORCH_CHECK_VALUE(slots[matrix] >= 0 && slot + slots[matrix] <= call.counts.size(), op,
                      ": weight_slots: got ", slots[matrix], " for matrix ", matrix,
                      ", expected numbers of slots that add up to ", call.counts.size());
    const int64_t own = sum(call.counts.slice(slot, slots[matrix]));
    TORCH_CHECK_VALUE(own <= rows[matrix], op, ": counts: got ", own,
                      " rows in the slots of matrix ", matrix, ", expected no more than the ",
                      rows[matrix], " that weight_rows gives it");
    slot += slots[matrix];
  }
  TORCH_CHECK_VALUE(slot == call.counts.size(), op, ": weight_slots: got numbers that add up to ",
                    slot, ", expected ", call.counts.size(), ", the number of slots");
  TORCH_CHECK_VALUE(count_rows(x) == sum(rows), op, ": weight_rows: got numbers that add up to ",
                    sum(rows), ", expected ", count_rows(x), ", the rows of the input");
}

}  // namespace

std::vector<ForwardPart> parts_of(const LoraLinearGroupedCall& call) {
  const Tensor x = flattened(call.x);
  return split<ForwardPart>(call, [&](ForwardPart& part) {
    part.x = x.narrow(0, part.begin, part.rows);
    part.weight = call.weight.select(0, part.matrix);
    if (call.bias.has_value()) part.bias = call.bias->select(0, part.matrix);
  });
}

std::vector<BackwardPart> parts_of(const LoraLinearGroupedBackwardCall& call) {
  const Tensor dy = flattened(call.dy), x = call.x.has_value() ? flattened(*call.x) : Tensor();
  return split<BackwardPart>(call, [&](BackwardPart& part) {
    part.dy = dy.narrow(0, part.begin, part.rows);
    if (x.defined()) part.x = x.narrow(0, part.begin, part.rows);
    if (call.weight.has_value()) part.weight = call.weight->select(0, part.matrix);
    if (!call.h.has_value()) return;
    part.h = call.h->narrow(0, part.h_begin, part.h_size);
    if (part.is_lora_linear()) part.hidden = part.h->view({part.rows, part.lora_A[0].size(0)});
  });
}

void check_weight_rows(const char* op, const LoraLinearGroupedCall& call, const Tensor& x) {
  check_parts(op, call, x, call.stacked() ? matrices_of(call.weight) : 0);
}

void check_weight_rows(const char* op, const LoraLinearGroupedBackwardCall& call, const Tensor& x) {
  const bool told = call.weight.has_value() && call.weight->dim() == 3;
  check_parts(op, call, x, told ? matrices_of(*call.weight) : call.weight_rows.size());
}

Tensor lora_linear_grouped_by_matrix(const LoraLinearGroupedCall& call) {
  check_weight_rows("lora_linear_grouped", call, call.x);
  TensorVector y;
  for (const ForwardPart& part : parts_of(call)) {
    y.push_back(part.is_base()          ? at::linear(part.x, part.weight, part.bias)
                : part.is_lora_linear() ? lora_linear(part.lora_linear())
                                        : lora_linear_grouped(part.grouped()));
  }
  const auto sizes = with_width(call.x, call.weight.sym_size(-2));
  return y.empty() ? at::zeros_symint(sizes, call.x.options()) : at::cat(y).reshape_symint(sizes);
}

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_by_matrix(const LoraLinearGroupedCall& call,
                                                             bool return_h) {
  TensorVector y, h;
  for (const ForwardPart& part : parts_of(call)) {
    if (part.is_base()) {
      y.push_back(at::linear(part.x, part.weight, part.bias));
      continue;
    }
    auto [own_y, own_h] = part.is_lora_linear() ? lora_linear_fwd(part.lora_linear(), return_h)
                                                : lora_linear_grouped_fwd(part.grouped(), return_h);
    y.push_back(own_y), h.push_back(own_h.flatten());
  }
  const auto compute = call.x.options().dtype(at::toOpMathType(call.x.scalar_type()));
  const auto sizes = with_width(call.x, call.weight.sym_size(-2));
  return {y.empty() ? at::empty_symint(sizes, call.x.options()) : at::cat(y).view_symint(sizes),
          h.empty() ? at::empty({0}, compute) : at::cat(h)};
}

GroupedResults lora_linear_grouped_bwd_by_matrix(const LoraLinearGroupedBackwardCall& call,
                                                 const GroupedMask& mask, at::IntArrayRef wanted) {
  const auto of_part = [](const BackwardPart& part, const GroupedMask& of, at::IntArrayRef own) {
    if (part.is_base()) return base_part_gradients(part, of);
    if (!part.is_lora_linear()) return lora_linear_grouped_bwd(part.grouped(), of, own);
    return grouped_results(lora_linear_bwd(part.lora_linear(), lora_linear_mask(of, own[0])));
  };
  return collect_gradients(call, mask, wanted, of_part);
}

GroupedResults base_part_gradients(const BackwardPart& part, const GroupedMask& mask) {
  auto [dweight, dbias] = base_gradients(part.dy, part.x.has_value() ? *part.x : Tensor(), mask);
  return {
      mask[kGroupedX] ? at::mm(part.dy, *part.weight) : Tensor(), dweight, dbias, {}, {}, {}, {}};
}

GradientMask lora_linear_mask(const GroupedMask& mask, int64_t wanted) {
  return {mask[kGroupedX],        mask[kGroupedWeight],   mask[kGroupedBias],
          (wanted & kSlotA) != 0, (wanted & kSlotB) != 0, (wanted & kSlotBias) != 0};
}

GroupedResults grouped_results(const Gradients& gradients) {
  const auto& [dx, dweight, dbias, dA, dB, dlora_bias] = gradients;
  return {dx, dweight, dbias, {}, {dA}, {dB}, {dlora_bias}};
}

GroupedResults collect_gradients(const LoraLinearGroupedBackwardCall& call, const GroupedMask& mask,
                                 at::IntArrayRef wanted, const PartGradients& of_part,
                                 const Tensor& dx) {
  const Tensor& dy = call.dy;
  const size_t matrices = call.weight_rows.size(), slots = call.lora_A.size();
  const int64_t N = dy.size(-1), K = call.lora_A[0].size(1);
  TensorVector dxs, dweight(matrices), dbias(matrices), dfactor, dA(slots), dB(slots),
      dbiases(slots);
  for (const BackwardPart& part : parts_of(call)) {
    GroupedMask own_mask = mask;
    if (part.is_base()) own_mask[kGroupedFactor] = false;
    const auto own = of_part(part, own_mask, wanted.slice(part.slot, part.lora_A.size()));
    dxs.push_back(std::get<0>(own));
    dweight[part.matrix] = std::get<1>(own), dbias[part.matrix] = std::get<2>(own);
    if (own_mask[kGroupedFactor]) dfactor.push_back(std::get<3>(own));
    const auto place = [&](TensorVector& all, const TensorVector& of_slots) {
      std::copy(of_slots.begin(), of_slots.end(), all.begin() + part.slot);
    };
    place(dA, std::get<4>(own)), place(dB, std::get<5>(own)), place(dbiases, std::get<6>(own));
  }

  const auto none = [&] { return at::empty({0}, dy.options()); };
  // Of all matrices, 0 of those without rows.
  const auto stacked = [&](bool is_wanted, TensorVector& each, at::IntArrayRef sizes) {
    if (!is_wanted) return none();
    for (Tensor& one : each) {
      if (!one.defined()) one = at::zeros(sizes, dy.options());
    }
    return at::stack(each);
  };
  const auto rest = [&](TensorVector& each, SlotGradient gradient, const auto& like) {
    for (size_t j = 0; j < slots; ++j) {
      if (each[j].defined()) continue;
      each[j] =
          (wanted[j] & gradient) ? at::zeros_like(like(j)) : at::empty({0}, like(j).options());
    }
  };
  rest(dA, kSlotA, [&](size_t j) { return call.lora_A[j]; });
  rest(dB, kSlotB, [&](size_t j) { return call.lora_B[j]; });
  rest(dbiases, kSlotBias, [&](size_t j) {
    return call.lora_bias.empty() ? none().to(call.lora_B[j].scalar_type()) : call.lora_bias[j];
  });
  Tensor all_dx = dx.defined() ? dx : none();
  if (mask[kGroupedX] && !dx.defined()) {
    const auto sizes = with_width(dy, K);
    all_dx =
        dxs.empty() ? at::zeros_symint(sizes, dy.options()) : at::cat(dxs).reshape_symint(sizes);
  }
  return {all_dx,
          stacked(mask[kGroupedWeight], dweight, {N, K}),
          stacked(mask[kGroupedBias], dbias, {N}),
          !mask[kGroupedFactor] ? none()
          : dfactor.empty()     ? at::zeros_like(*call.factor)
                                : at::cat(dfactor),
          dA,
          dB,
          dbiases};
}

}  // namespace lora_ext
