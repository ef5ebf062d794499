// lora_linear_grouped of a stack of weights: matrix after matrix, each with its own rows of x and
// its own slots, a call of its own. One whose rows all have its only slot is lora_linear.
#pragma once

#include <functional>
#include <vector>

#include "ops/lora_linear.h"
#include "ops/lora_linear_grouped.h"

namespace lora_ext {

// Of a matrix that has rows.
struct MatrixPart {
  int64_t matrix;
  int64_t begin, rows;      // of x
  int64_t h_begin, h_size;  // of h
  int64_t slot;             // the first of its slots, which the following are of
  at::TensorList lora_A, lora_B, lora_biases;
  Tensor order;
  at::IntArrayRef counts;
  OptionalTensor factor;
  at::ArrayRef<double> scaling, dropout_p;
  OptionalTensor rng_state;
  OptionalTensor lora_bias;  // of its only slot

  bool is_base() const { return lora_A.empty(); }
  bool is_lora_linear() const {
    return lora_A.size() == 1 && counts[0] == rows && !factor.has_value();
  }
};

// The calls that parts are; these live no longer than the part.
struct ForwardPart : MatrixPart {
  Tensor x, weight;
  OptionalTensor bias;

  LoraLinearGroupedCall grouped() const {
    return {x,      weight,  bias,      lora_A,    lora_B, lora_biases, order, counts,
            factor, scaling, dropout_p, rng_state, {},     {},          {}};
  }
  LoraLinearCall lora_linear() const {
    return {x,
            weight,
            bias,
            lora_A[0],
            lora_B[0],
            lora_bias,
            {scaling[0], {}},
            {dropout_p[0], rng_state}};
  }
};
struct BackwardPart : MatrixPart {
  Tensor dy;
  OptionalTensor x, h, weight;
  OptionalTensor hidden;  // h [rows, r] of its only slot

  LoraLinearGroupedBackwardCall grouped() const {
    return {dy,     x,      h,       weight,    lora_A,    lora_B, lora_biases, order,
            counts, factor, scaling, dropout_p, rng_state, {},     {},          {}};
  }
  LoraLinearBackwardCall lora_linear() const {
    return {dy,        x,         hidden,           weight,
            lora_A[0], lora_B[0], {scaling[0], {}}, {dropout_p[0], rng_state}};
  }
};
// One after another, as their rows are. They live no longer than the call.
std::vector<ForwardPart> parts_of(const LoraLinearGroupedCall& call);
std::vector<BackwardPart> parts_of(const LoraLinearGroupedBackwardCall& call);

// rows and slots of a stack, or none of a single matrix; x is the tensor that has the rows.
void check_weight_rows(const char* op, const LoraLinearGroupedCall& call, const Tensor& x);
void check_weight_rows(const char* op, const LoraLinearGroupedBackwardCall& call, const Tensor& x);

// Out of calls for each part: of operators that are differentiable and know autocast, and of those
// that backends implement.
Tensor lora_linear_grouped_by_matrix(const LoraLinearGroupedCall& call);
std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_by_matrix(const LoraLinearGroupedCall& call,
                                                             bool return_h);
GroupedResults lora_linear_grouped_bwd_by_matrix(const LoraLinearGroupedBackwardCall& call,
                                                 const GroupedMask& mask, at::IntArrayRef wanted);

// The gradients of a part without slots.
GroupedResults base_part_gradients(const BackwardPart& part, const GroupedMask& mask);
// What gradients of a part are wanted of lora_linear, and these as those of lora_linear_grouped.
GradientMask lora_linear_mask(const GroupedMask& mask, int64_t wanted);
GroupedResults grouped_results(const Gradients& gradients);

// The gradients of all parts together. `of_part` gives those of one; where dx is given, it has
// written them there.
using PartGradients =
    std::function<GroupedResults(const BackwardPart&, const GroupedMask&, at::IntArrayRef wanted)>;
GroupedResults collect_gradients(const LoraLinearGroupedBackwardCall& call, const GroupedMask& mask,
                                 at::IntArrayRef wanted, const PartGradients& of_part,
                                 const Tensor& dx = {});

}  // namespace lora_ext
