// Products are made in the dtype of the adapters. Where that is the base's, each is rounded once,
// into its place; the result of fp32 adapters beside a 16-bit base passes through a temporary.
#include "ops/lora_linear_blas.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "ops/base_product.h"
#include "ops/dropout.h"

namespace lora_ext {
namespace {

// out = factor * a b + bias, which may be `out` itself. BLAS adds the product of a single row to
// what is there term by term, in memory: it is made apart, to be rounded once.
void scaled_mm_out(const Tensor& out, const Tensor& a, const Tensor& b, double factor,
                   const Tensor& bias = {}) {
  const bool apart = bias.defined() && a.size(0) == 1;
  const bool in_place = out.scalar_type() == a.scalar_type() && !apart;
  Tensor product = in_place ? out : at::empty(out.sizes(), a.options());
  if (bias.defined() && !apart) {
    at::addmm_out(product, bias.to(a.scalar_type()), a, b, 1, factor);
  } else {
    at::addmm_out(product, product, a, b, /*beta=*/0, /*alpha=*/factor);
  }
  if (apart) product.add_(bias);
  if (!in_place) out.copy_(product);
}

// h or dh times the scaling tensor, if there is one: a factor of BLAS is a number on the host.
Tensor rescaled(const Tensor& hidden, const HiddenScale& scaling) {
  if (!scaling.tensor.has_value()) return hidden;
  const auto dtype = hidden.scalar_type();
  return (hidden.to(at::toOpMathType(dtype)) * *scaling.tensor).to(dtype);
}

// Under dropout x is read in blocks of rows, so that neither the mask nor the copy of what it keeps
// is larger than this many elements.
constexpr int64_t kBlockElements = int64_t{1} << 22;

// f(first row, rows, mask) for each block; all rows at once, and no mask, without dropout.
template <class F>
void for_each_block(const LoraDropout& dropout, int64_t M, int64_t K, const F& f) {
  if (!dropout.enabled()) return f(0, M, Tensor());
  const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, K));
  for (int64_t first = 0; first < M; first += block) {
    const int64_t rows = std::min(block, M - first);
    f(first, rows, dropout_mask(*dropout.rng_state, rows, K, dropout.p, first));
  }
}

// The elements of x that are kept, not scaled: that is left to the products, which round later.
Tensor kept(const Tensor& x, const Tensor& keep, at::ScalarType dtype) {
  return (keep.defined() ? at::where(keep, x, at::zeros({}, x.options())) : x).to(dtype);
}

// h [M, r] = dropout(x) A^T in the dtype of A
Tensor down(const Tensor& x, const Tensor& lora_A, const LoraDropout& dropout) {
  const int64_t M = x.size(0), K = x.size(1);
  const Tensor h = at::empty({M, lora_A.size(0)}, lora_A.options());
  for_each_block(dropout, M, K, [&](int64_t first, int64_t rows, const Tensor& keep) {
    scaled_mm_out(h.narrow(0, first, rows),
                  kept(x.narrow(0, first, rows), keep, lora_A.scalar_type()), lora_A.t(),
                  dropout.survivor());
  });
  return h;
}

}  // namespace

void low_rank_forward_blas(const LowRankForward& problem) {
  const HiddenScale& scaling = problem.scaling;
  const Tensor h = down(problem.x, problem.lora_A, problem.dropout);
  if (problem.h.defined()) problem.h.copy_(h);
  scaled_mm_out(problem.y, rescaled(h, scaling), problem.lora_B.t(), scaling.number, problem.bias);
}

void low_rank_backward_blas(const LowRankBackward& problem) {
  const int64_t M = problem.dy.size(0), K = problem.lora_A.size(1);
  const HiddenScale& scaling = problem.scaling;
  const LoraDropout& dropout = problem.dropout;
  const double factor = scaling.number * dropout.survivor();
  const auto dtype = problem.lora_A.scalar_type();
  const Tensor dy = problem.dy.to(dtype);
  if (problem.dB.defined()) {
    const Tensor h =
        problem.h.defined() ? problem.h.to(dtype) : down(problem.x, problem.lora_A, dropout);
    scaled_mm_out(problem.dB, dy.t(), rescaled(h, scaling), scaling.number);
  }
  if (!problem.dA.defined() && !problem.dx.defined()) return;
  // Scaled by the numbers where it is used
  const Tensor all_dh = rescaled(at::mm(dy, problem.lora_B), scaling);
  Tensor sums;  // of dA, where there are several blocks
  for_each_block(dropout, M, K, [&](int64_t first, int64_t rows, const Tensor& keep) {
    const Tensor dh = all_dh.narrow(0, first, rows);
    if (problem.dA.defined()) {
      const Tensor x = kept(problem.x.narrow(0, first, rows), keep, dtype);
      if (rows == M) {
        scaled_mm_out(problem.dA, dh.t(), x, factor);
      } else {
        const Tensor of_block = at::mm(dh.t(), x).to(at::toOpMathType(dtype));
        sums = sums.defined() ? sums.add_(of_block) : of_block;
      }
    }
    if (problem.dx.defined()) {
      const Tensor dx = problem.dx.narrow(0, first, rows);
      scaled_mm_out(dx, dh, problem.lora_A, factor);
      if (keep.defined()) dx.mul_(keep);
    }
  });
  if (sums.defined()) problem.dA.copy_(sums.mul_(factor));
}

std::tuple<Tensor, Tensor> lora_linear_fwd_composed(const LoraLinearCall& call, bool return_h) {
  check_lora_linear(call);
  auto [y, h, low_rank] = lora_linear_prepare_fwd(call, return_h);
  if (y.numel() == 0) return {y, h.zero_()};
  low_rank_forward_blas(low_rank);
  DenseProduct(call.weight).add(low_rank.y, low_rank.x);
  return {y, h};
}

Gradients lora_linear_bwd_composed(const LoraLinearBackwardCall& call, GradientMask mask) {
  check_lora_linear_bwd(call, mask);
  auto [gradients, low_rank, done] = lora_linear_prepare_bwd(call, mask);
  if (done) return gradients;
  low_rank_backward_blas(low_rank);
  if (mask[kGradX]) DenseProduct(*call.weight).add_gradient(low_rank.dx, low_rank.dy);
  return gradients;
}

}  // namespace lora_ext
