// lora_linear where rows have adapters of their own: the base product once over all rows, and for
// each row the low-rank part of its slot. A row that is in no slot is the base's, bit for bit.
//
// Three operators, as of lora_linear: `lora_linear_grouped` is the one to call, `_fwd` and `_bwd`
// are what backends implement. Slots differ freely in rank, scaling, dropout and dtype: nothing is
// stacked or padded.
//
// The weight may be a stack of matrices, as of experts, each with rows of x and slots of its own:
// so many calls, whose results lie one after another (lora_linear_grouped_stack.h).
#pragma once

#include <vector>

#include "ops/lora_linear.h"

namespace lora_ext {

// It lives no longer than what it was made of.
struct GroupedAdapters {
  at::TensorList lora_A;            // of each slot [r, K]
  at::TensorList lora_B;            // of each slot [N, r]
  at::TensorList lora_bias;         // of each slot [N], or [0] for none; or empty: none has one
  const Tensor& order;              // [R] int32: the rows of slot 0, of slot 1, ...
  at::IntArrayRef counts;           // how many rows each slot has; R in all
  const OptionalTensor& factor;     // [R], floating: multiplies the update of each of these rows
  at::ArrayRef<double> scaling;     // of each slot
  at::ArrayRef<double> dropout_p;   // of each slot
  const OptionalTensor& rng_state;  // [2], int64; present where a slot drops elements
  at::IntArrayRef rounds;           // empty: each row is in one slot; else see rounds_of

  size_t slots() const { return lora_A.size(); }
};

struct LoraLinearGroupedCall {
  const Tensor& x;             // [..., K]
  const Tensor& weight;        // [N, K]; or a stack [E, N, K]
  const OptionalTensor& bias;  // [N]; or [E, N]
  at::TensorList lora_A, lora_B, lora_bias;
  const Tensor& order;
  at::IntArrayRef counts;
  const OptionalTensor& factor;
  at::ArrayRef<double> scaling, dropout_p;
  const OptionalTensor& rng_state;
  at::IntArrayRef rounds;
  // Of a stack, whose order counts from each matrix's first row; without rounds. Else empty.
  at::IntArrayRef weight_rows;   // of each matrix: how many of x's rows it multiplies, in order
  at::IntArrayRef weight_slots;  // and how many of the slots are its own

  bool stacked() const { return weight.dim() == 3; }
  auto fields() const {
    return std::tie(x, weight, bias, lora_A, lora_B, lora_bias, order, counts, factor, scaling,
                    dropout_p, rng_state, rounds, weight_rows, weight_slots);
  }
  GroupedAdapters adapters() const { return adapters_of(order); }
  // With `order` as another tensor holds it, which is to live as long.
  GroupedAdapters adapters_of(const Tensor& other_order) const {
    return {lora_A, lora_B,  lora_bias, other_order, counts,
            factor, scaling, dropout_p, rng_state,   rounds};
  }
};

struct LoraLinearGroupedBackwardCall {
  const Tensor& dy;              // [..., N]
  const OptionalTensor& x;       // [..., K]
  const OptionalTensor& h;       // as `_fwd` returns it
  const OptionalTensor& weight;  // [N, K]; or a stack [E, N, K]
  at::TensorList lora_A, lora_B, lora_bias;
  const Tensor& order;
  at::IntArrayRef counts;
  const OptionalTensor& factor;
  at::ArrayRef<double> scaling, dropout_p;
  const OptionalTensor& rng_state;
  at::IntArrayRef rounds;
  // Of a stack, whose order counts from each matrix's first row; without rounds. Else empty.
  at::IntArrayRef weight_rows;   // of each matrix: how many of x's rows it multiplies, in order
  at::IntArrayRef weight_slots;  // and how many of the slots are its own

  bool stacked() const { return !weight_rows.empty(); }
  auto fields() const {
    return std::tie(dy, x, h, weight, lora_A, lora_B, lora_bias, order, counts, factor, scaling,
                    dropout_p, rng_state, rounds, weight_rows, weight_slots);
  }
  GroupedAdapters adapters() const { return adapters_of(order); }
  // With `order` as another tensor holds it, which is to live as long.
  GroupedAdapters adapters_of(const Tensor& other_order) const {
    return {lora_A, lora_B,  lora_bias, other_order, counts,
            factor, scaling, dropout_p, rng_state,   rounds};
  }
};

// The gradients of `_bwd` that are wanted.
enum GroupedGradient { kGroupedX, kGroupedWeight, kGroupedBias, kGroupedFactor, kGroupedGradients };
using GroupedMask = std::array<bool, kGroupedGradients>;
// And of each slot: a sum of these.
enum SlotGradient : int64_t { kSlotA = 1, kSlotB = 2, kSlotBias = 4 };

using GroupedResults =
    std::tuple<Tensor, Tensor, Tensor, Tensor, TensorVector, TensorVector, TensorVector>;

// The operators, through the dispatcher.
Tensor lora_linear_grouped(const LoraLinearGroupedCall& call);
// y [..., N]; if return_h, h = dropout(x) A^T of the rows of slot 0, [counts[0], r], of slot 1, ...
// one after another in one vector of the compute type, without factor; else empty. Of a slot that
// has all rows of a stack's matrix and no factor, the rows are in their own order.
std::tuple<Tensor, Tensor> lora_linear_grouped_fwd(const LoraLinearGroupedCall& call,
                                                   bool return_h);
// (dx, dweight, dbias, dfactor, dA, dB, dlora_bias); what is not wanted comes back empty. Needed:
// weight for dx; x for dweight and dA; h for dfactor, and h or x for dB.
GroupedResults lora_linear_grouped_bwd(const LoraLinearGroupedBackwardCall& call, GroupedMask mask,
                                       at::IntArrayRef wanted);

void check_lora_linear_grouped(const LoraLinearGroupedCall& call,
                               const char* op = "lora_linear_grouped");
void check_lora_linear_grouped_bwd(const LoraLinearGroupedBackwardCall& call,
                                   const GroupedMask& mask, at::IntArrayRef wanted,
                                   const char* op = "lora_linear_grouped_bwd");

// What of one slot a backend works with.
struct Slot {
  int64_t begin, rows;  // of `order`
  int64_t h_begin;      // the first element of h
  Tensor lora_A;        // [r, K], contiguous
  Tensor lora_B;        // [N, r], contiguous
  Tensor lora_bias;     // [N], or undefined
  double scaling;
  LoraDropout dropout;

  int64_t rank() const { return lora_A.size(0); }
  at::ScalarType dtype() const { return lora_A.scalar_type(); }
};
std::vector<Slot> slots_of(const GroupedAdapters& adapters);

// Where rows are in several slots, in each once, their updates are added one after another. So the
// rows of each slot lie in rounds, of which `rounds` has pairs (round, rows), slot after slot:
// rounds go up in a slot, their rows add up to its count. In a round no row is twice, and what
// rounds a row is in go up with its slots.
struct SlotRound {
  size_t slot;
  int64_t round, begin, rows;  // of `order`
};
// In that order, without slots of no rows. Where `rounds` is empty all is round 0.
std::vector<SlotRound> rounds_of(const GroupedAdapters& adapters);
// How many elements h has.
int64_t grouped_hidden_size(const GroupedAdapters& adapters);

}  // namespace lora_ext
