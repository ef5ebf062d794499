// Schemas, dispatcher handles, checks and Meta kernels of lora_linear_grouped.
#include "ops/lora_linear_grouped.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <numeric>

#include "ops/checks.h"
#include "ops/lora_linear_grouped_composed.h"
#include "ops/lora_linear_grouped_stack.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_meta(const LoraLinearGroupedCall& call,
                                                        bool return_h) {
  check_lora_linear_grouped(call);
  const auto compute = call.x.options().dtype(at::toOpMathType(call.x.scalar_type()));
  return {call.x.new_empty_symint(with_width(call.x, call.weight.sym_size(-2))),
          at::empty({return_h ? grouped_hidden_size(call.adapters()) : 0}, compute)};
}

GroupedResults lora_linear_grouped_bwd_meta(const LoraLinearGroupedBackwardCall& call,
                                            GroupedMask mask, at::IntArrayRef wanted) {
  check_lora_linear_grouped_bwd(call, mask, wanted);
  const auto& dy = call.dy;
  const c10::SymInt K = call.lora_A[0].sym_size(1), N = dy.sym_size(-1);
  TensorVector dA, dB, dlora_bias;
  for (size_t j = 0; j < call.lora_A.size(); ++j) {
    dA.push_back(gradient_or_empty(wanted[j] & kSlotA, call.lora_A[j]));
    dB.push_back(gradient_or_empty(wanted[j] & kSlotB, call.lora_B[j]));
    dlora_bias.push_back(gradient_or_empty(wanted[j] & kSlotBias, call.lora_B[j], N));
  }
  std::vector<c10::SymInt> of_weight = {N, K}, of_bias = {N};
  if (call.stacked()) {
    const auto matrices = static_cast<int64_t>(call.weight_rows.size());
    of_weight.insert(of_weight.begin(), matrices), of_bias.insert(of_bias.begin(), matrices);
  }
  return {gradient_or_empty(mask[kGroupedX], dy, with_width(dy, K)),
          gradient_or_empty(mask[kGroupedWeight], dy, of_weight),
          gradient_or_empty(mask[kGroupedBias], dy, of_bias),
          mask[kGroupedFactor] ? at::empty_like(*call.factor) : at::empty({0}, dy.options()),
          dA,
          dB,
          dlora_bias};
}

void check_count(const char* op, const char* name, size_t got, size_t slots) {
  TORCH_CHECK_VALUE(got == slots, op, ": ", name, ": got ", got, " entries, expected ", slots,
                    ", one for each of lora_A");
}

void check_rounds(const char* op, const GroupedAdapters& adapters) {
  const at::IntArrayRef rounds = adapters.rounds;
  if (rounds.empty()) return;
  size_t at = 0;
  for (size_t j = 0; j < adapters.slots(); ++j) {
    int64_t left = adapters.counts[j];
    for (int64_t last = -1; left > 0 && at + 1 < rounds.size(); at += 2) {
      const int64_t round = rounds[at], rows = rounds[at + 1];
      TORCH_CHECK_VALUE(round > last && rows > 0 && rows <= left, op, ": rounds: got (", round,
                        ", ", rows, ") in slot ", j, " after round ", last, ", with ", left,
                        " rows left, expected pairs (round, rows) of each slot, whose rounds go up "
                        "from 0 and whose rows add up to its counts");
      last = round, left -= rows;
    }
    TORCH_CHECK_VALUE(left <= 0, op, ": rounds: got ", rounds.size(), " numbers, with ", left,
                      " rows of slot ", j, " left, expected pairs (round, rows) for all of counts");
  }
  TORCH_CHECK_VALUE(at == rounds.size(), op, ": rounds: got ", rounds.size(),
                    " numbers, expected pairs (round, rows) whose rows add up to counts, as the "
                    "first ",
                    at, " do");
}

// x is the tensor that the others are to fit, under the name that it has in the call.
void check_grouped_adapters(const char* op, const char* name, const Tensor& x, const c10::SymInt& N,
                            const c10::SymInt& K, const GroupedAdapters& adapters) {
  const size_t slots = adapters.slots();
  TORCH_CHECK_VALUE(slots > 0, op,
                    ": lora_A: got no adapters, expected at least one; the base "
                    "alone is torch.nn.functional.linear");
  check_count(op, "lora_B", adapters.lora_B.size(), slots);
  if (!adapters.lora_bias.empty()) check_count(op, "lora_bias", adapters.lora_bias.size(), slots);
  check_count(op, "counts", adapters.counts.size(), slots);
  check_count(op, "scaling", adapters.scaling.size(), slots);
  check_count(op, "dropout_p", adapters.dropout_p.size(), slots);
  int64_t rows = 0;
  bool drops = false;
  for (size_t j = 0; j < slots; ++j) {
    check_adapters(op, name, x, N, K, adapters.lora_A[j], adapters.lora_B[j]);
    check_dropout_p(op, adapters.dropout_p[j]);
    drops = drops || adapters.dropout_p[j] > 0.0;
    if (!adapters.lora_bias.empty() && adapters.lora_bias[j].sym_numel() != 0) {
      check_vector(op, "lora_bias", adapters.lora_bias[j], x, N, adapters.lora_B[j].scalar_type());
    }
    TORCH_CHECK_VALUE(adapters.counts[j] >= 0, op, ": counts: got ", adapters.counts[j],
                      ", expected numbers of rows");
    rows += adapters.counts[j];
  }
  check_rounds(op, adapters);
  const Tensor& order = adapters.order;
  check_device(op, "order", order, x);
  TORCH_CHECK_VALUE(
      order.scalar_type() == at::kInt && order.dim() == 1 && order.sym_size(0) == rows, op,
      ": order: got ", dtype_name(order.scalar_type()), " of shape ", order.sym_sizes(),
      ", expected int32 [", rows, "], the sum of counts");
  if (adapters.factor.has_value()) {
    const Tensor& factor = *adapters.factor;
    check_device(op, "factor", factor, x);
    TORCH_CHECK_VALUE(
        at::isFloatingType(factor.scalar_type()) && factor.dim() == 1 && factor.sym_size(0) == rows,
        op, ": factor: got ", dtype_name(factor.scalar_type()), " of shape ", factor.sym_sizes(),
        ", expected a floating-point [", rows, "], one for each entry of order");
  }
  if (drops) {
    TORCH_CHECK_VALUE(adapters.rng_state.has_value(), op,
                      ": rng_state: got None with dropout, "
                      "expected an int64 tensor [2] from draw_rng_state(x)");
    check_device(op, "rng_state", *adapters.rng_state, x);
    check_rng_state(op, *adapters.rng_state);
  }
}

void check_base_weight(const char* op, const Tensor& x, const Tensor& weight) {
  check_device(op, "weight", weight, x);
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": weight: got dtype ",
                   dtype_name(weight.scalar_type()), ", expected the input's ",
                   dtype_name(x.scalar_type()),
                   "; convert one of them with .to(), or use torch.autocast");
}

void check_base_bias(const char* op, const LoraLinearGroupedCall& call, const c10::SymInt& N) {
  if (!call.stacked() || !call.bias.has_value()) {
    return check_vector(op, "bias", call.bias, call.x, N, call.x.scalar_type());
  }
  const Tensor& bias = *call.bias;
  const c10::SymInt& matrices = call.weight.sym_size(0);
  TORCH_CHECK_VALUE(bias.dim() == 2 && bias.sym_size(0) == matrices && bias.sym_size(1) == N, op,
                    ": bias: got shape ", bias.sym_sizes(), ", expected [", matrices, ", ", N,
                    "], a row for each matrix of weight");
  if (matrices > 0) check_vector(op, "bias", bias.select(0, 0), call.x, N, call.x.scalar_type());
}

}  // namespace

void check_lora_linear_grouped(const LoraLinearGroupedCall& call, const char* op) {
  const auto &x = call.x, &weight = call.weight;
  check_dense(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x: got a 0-d tensor, expected [..., in_features]");
  check_base_dtype(op, "x", x);
  check_base_weight(op, x, weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3, op, ": weight: got shape ",
                    weight.sym_sizes(),
                    ", expected [out_features, in_features], or a stack of such matrices");
  TORCH_CHECK_VALUE(x.sym_size(-1) == weight.sym_size(-1), op, ": x: got shape ", x.sym_sizes(),
                    ", expected [..., ", weight.sym_size(-1),
                    "], in_features being the last dimension of weight");
  const c10::SymInt N = weight.sym_size(-2);
  check_base_bias(op, call, N);
  check_grouped_adapters(op, "x", x, N, weight.sym_size(-1), call.adapters());
  check_weight_rows(op, call, x);
}

void check_lora_linear_grouped_bwd(const LoraLinearGroupedBackwardCall& call,
                                   const GroupedMask& mask, at::IntArrayRef wanted,
                                   const char* op) {
  const auto& dy = call.dy;
  check_dense(op, "dy", dy);
  TORCH_CHECK_VALUE(dy.dim() >= 1, op, ": dy: got a 0-d tensor, expected [..., out_features]");
  const GroupedAdapters adapters = call.adapters();
  const c10::SymInt K = adapters.slots() > 0 ? last_size(adapters.lora_A[0]) : c10::SymInt(0);
  check_grouped_adapters(op, "dy", dy, dy.sym_size(-1), K, adapters);
  check_count(op, "wanted", wanted.size(), adapters.slots());
  bool wants_A = false, wants_B = false;
  for (const int64_t gradients : wanted) {
    wants_A = wants_A || (gradients & kSlotA);
    wants_B = wants_B || (gradients & kSlotB);
  }
  TORCH_CHECK_VALUE(!mask[kGroupedX] || call.weight.has_value(), op,
                    ": weight: got None, expected [out_features, in_features] for the gradient "
                    "of x");
  check_weight_rows(op, call, dy);
  TORCH_CHECK_VALUE(!(mask[kGroupedWeight] || wants_A) || call.x.has_value(), op,
                    ": x: got None, expected [..., in_features] for the gradient of weight or "
                    "lora_A");
  TORCH_CHECK_VALUE(!wants_B || call.x.has_value() || call.h.has_value(), op,
                    ": h: got None without x, expected what _fwd returned for the gradient of "
                    "lora_B");
  TORCH_CHECK_VALUE(!mask[kGroupedFactor] || (call.h.has_value() && call.factor.has_value()), op,
                    ": h: got None, expected what _fwd returned for the gradient of factor");
  if (call.weight.has_value()) {
    check_base_weight(op, dy, *call.weight);
    const Tensor& weight = *call.weight;
    TORCH_CHECK_VALUE(weight.dim() == (call.stacked() ? 3 : 2) &&
                          weight.sym_size(-2) == dy.sym_size(-1) && weight.sym_size(-1) == K,
                      op, ": weight: got shape ", weight.sym_sizes(), ", expected ",
                      call.stacked() ? "[matrices, " : "[", dy.sym_size(-1), ", ", K,
                      "], [out_features, in_features]", call.stacked() ? " of each matrix" : "");
  }
  if (call.x.has_value()) {
    check_device(op, "x", *call.x, dy);
    TORCH_CHECK_VALUE(call.x->dim() == dy.dim() && call.x->sym_size(-1) == K &&
                          count_rows(*call.x) == count_rows(dy),
                      op, ": x: got shape ", call.x->sym_sizes(), ", expected dy's ",
                      dy.sym_sizes(), " with in_features ", K, " last");
    TORCH_CHECK_TYPE(call.x->scalar_type() == dy.scalar_type(), op, ": x: got dtype ",
                     dtype_name(call.x->scalar_type()), ", expected dy's ",
                     dtype_name(dy.scalar_type()));
  }
  if (call.h.has_value()) {
    const int64_t size = grouped_hidden_size(adapters);
    check_device(op, "h", *call.h, dy);
    TORCH_CHECK_VALUE(call.h->dim() == 1 && call.h->sym_size(0) == size &&
                          call.h->scalar_type() == at::toOpMathType(dy.scalar_type()),
                      op, ": h: got ", dtype_name(call.h->scalar_type()), " of shape ",
                      call.h->sym_sizes(), ", expected [", size, "] of what _fwd returned");
  }
}

int64_t grouped_hidden_size(const GroupedAdapters& adapters) {
  int64_t size = 0;
  for (size_t j = 0; j < adapters.slots(); ++j) {
    size += adapters.counts[j] * adapters.lora_A[j].size(0);
  }
  return size;
}

std::vector<Slot> slots_of(const GroupedAdapters& adapters) {
  std::vector<Slot> slots;
  slots.reserve(adapters.slots());
  int64_t begin = 0, h_begin = 0;
  for (size_t j = 0; j < adapters.slots(); ++j) {
    const int64_t rows = adapters.counts[j];
    const bool biased = !adapters.lora_bias.empty() && adapters.lora_bias[j].numel() > 0;
    slots.push_back({begin,
                     rows,
                     h_begin,
                     adapters.lora_A[j].contiguous(),
                     adapters.lora_B[j].contiguous(),
                     biased ? adapters.lora_bias[j] : Tensor(),
                     adapters.scaling[j],
                     {adapters.dropout_p[j], adapters.rng_state}});
    begin += rows;
    h_begin += rows * adapters.lora_A[j].size(0);
  }
  return slots;
}

std::vector<SlotRound> rounds_of(const GroupedAdapters& adapters) {
  std::vector<SlotRound> rounds;
  rounds.reserve(adapters.slots());
  int64_t begin = 0;
  size_t at = 0;
  for (size_t j = 0; j < adapters.slots(); ++j) {
    for (const int64_t end = begin + adapters.counts[j]; begin < end;) {
      const bool told = !adapters.rounds.empty();
      const int64_t round = told ? adapters.rounds[at++] : 0;
      const int64_t rows = told ? adapters.rounds[at++] : end - begin;
      rounds.push_back({j, round, begin, rows});
      begin += rows;
    }
  }
  return rounds;
}

Tensor lora_linear_grouped(const LoraLinearGroupedCall& call) {
  static const Operator<&lora_linear_grouped> op("lora_ext::lora_linear_grouped");
  return op(call);
}

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd(const LoraLinearGroupedCall& call,
                                                   bool return_h) {
  static const Operator<&lora_linear_grouped_fwd> op("lora_ext::lora_linear_grouped_fwd");
  return op(call, return_h);
}

GroupedResults lora_linear_grouped_bwd(const LoraLinearGroupedBackwardCall& call, GroupedMask mask,
                                       at::IntArrayRef wanted) {
  static const Operator<&lora_linear_grouped_bwd> op("lora_ext::lora_linear_grouped_bwd");
  return op(call, mask, wanted);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def(
      "lora_linear_grouped(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor[] lora_bias, Tensor order, int[] counts, Tensor? factor, "
      "float[] scaling, float[] dropout_p, Tensor? rng_state=None, int[] rounds=[], "
      "int[] weight_rows=[], int[] weight_slots=[]) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_grouped_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor[] lora_bias, Tensor order, int[] counts, Tensor? factor, "
      "float[] scaling, float[] dropout_p, Tensor? rng_state=None, int[] rounds=[], "
      "int[] weight_rows=[], int[] weight_slots=[], bool return_h=False) "
      "-> (Tensor y, Tensor h)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_grouped_bwd(Tensor dy, Tensor? x, Tensor? h, Tensor? weight, "
      "Tensor[] lora_A, Tensor[] lora_B, Tensor[] lora_bias, Tensor order, int[] counts, "
      "Tensor? factor, float[] scaling, float[] dropout_p, Tensor? rng_state, int[] rounds, "
      "int[] weight_rows, int[] weight_slots, bool[4] mask, int[] wanted) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dfactor, Tensor[] dlora_A, "
      "Tensor[] dlora_B, Tensor[] dlora_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("lora_linear_grouped_fwd", flat<&lora_linear_grouped_fwd_meta>);
  m.impl("lora_linear_grouped_bwd", flat<&lora_linear_grouped_bwd_meta>);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_grouped_fwd", flat<&lora_linear_grouped_fwd_composed>);
  m.impl("lora_linear_grouped_bwd", flat<&lora_linear_grouped_bwd_composed>);
}

// Called directly, these two have no derivative and say so in backward.
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("lora_linear_grouped_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_grouped_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
