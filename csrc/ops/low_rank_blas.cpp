// Products are made in the dtype of the adapters. Where that is the base's, each is rounded once,
// into its place; the result of fp32 adapters beside a 16-bit base passes through a temporary.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "../common/dropout.h"
#include "ops/dropout.h"
#include "ops/low_rank.h"

namespace lora_ext {
namespace {

// out = scale * a b + bias
void scaled_mm_out(const Tensor& out, const Tensor& a, const Tensor& b, double scale,
                   const Tensor& bias = {}) {
  const bool in_place = out.scalar_type() == a.scalar_type();
  Tensor product = in_place ? out : at::empty(out.sizes(), a.options());
  if (bias.defined()) {
    at::addmm_out(product, bias.to(a.scalar_type()), a, b, 1, scale);
  } else {
    at::addmm_out(product, product, a, b, /*beta=*/0, /*alpha=*/scale);
  }
  if (!in_place) out.copy_(product);
}

// h or dh times the scaling tensor, if there is one: a factor of BLAS is a number on the host.
Tensor rescaled(const Tensor& hidden, const LoraScale& scale) {
  if (!scale.scaling_tensor.has_value()) return hidden;
  const auto dtype = hidden.scalar_type();
  return (hidden.to(at::toOpMathType(dtype)) * *scale.scaling_tensor).to(dtype);
}

// bool [M, K], or undefined without dropout
Tensor keep_mask(const LoraScale& scale, int64_t M, int64_t K) {
  return scale.dropout_p > 0.0 ? dropout_mask(*scale.rng_state, M, K, scale.dropout_p) : Tensor();
}

// The elements of x that are kept, not scaled: that is left to the products, which round later.
Tensor kept(const Tensor& x, const Tensor& keep, at::ScalarType dtype) {
  return (keep.defined() ? at::where(keep, x, at::zeros({}, x.options())) : x).to(dtype);
}

double survivor_scale(const LoraScale& scale) {
  return scale.dropout_p > 0.0 ? dropout_scale(scale.dropout_p) : 1.0;
}

}  // namespace

void low_rank_forward_blas(const LowRankForward& problem) {
  const int64_t M = problem.x.size(0), K = problem.x.size(1), r = problem.lora_A.size(0);
  const LoraScale& scale = problem.scale;
  const Tensor h = at::empty({M, r}, problem.lora_A.options());
  const Tensor x = kept(problem.x, keep_mask(scale, M, K), h.scalar_type());
  scaled_mm_out(h, x, problem.lora_A.t(), survivor_scale(scale));
  if (problem.h.defined()) problem.h.copy_(h);
  scaled_mm_out(problem.y, rescaled(h, scale), problem.lora_B.t(), scale.scaling, problem.bias);
}

void low_rank_backward_blas(const LowRankBackward& problem) {
  const int64_t M = problem.dy.size(0), K = problem.lora_A.size(1), r = problem.lora_A.size(0);
  const LoraScale& scale = problem.scale;
  const double s = scale.scaling, survivor = survivor_scale(scale);
  const auto dtype = problem.lora_A.scalar_type();
  const bool make_h = problem.dB.defined() && !problem.h.defined();
  const bool reads_x = make_h || problem.dA.defined();
  const Tensor keep = reads_x || problem.dx.defined() ? keep_mask(scale, M, K) : Tensor();
  const Tensor x = reads_x ? kept(problem.x, keep, dtype) : Tensor();
  const Tensor dy = problem.dy.to(dtype);
  if (problem.dB.defined()) {
    const Tensor h = make_h ? at::empty({M, r}, dy.options()) : problem.h.to(dtype);
    if (make_h) scaled_mm_out(h, x, problem.lora_A.t(), survivor);
    scaled_mm_out(problem.dB, dy.t(), rescaled(h, scale), s);
  }
  if (!problem.dA.defined() && !problem.dx.defined()) return;
  // Scaled by the numbers where it is used
  const Tensor dh = rescaled(at::mm(dy, problem.lora_B), scale);
  if (problem.dA.defined()) scaled_mm_out(problem.dA, dh.t(), x, s * survivor);
  if (problem.dx.defined()) {
    scaled_mm_out(problem.dx, dh, problem.lora_A, s * survivor);
    if (keep.defined()) problem.dx.mul_(keep);
  }
}

}  // namespace lora_ext
