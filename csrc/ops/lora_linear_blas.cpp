// Products are made in one dtype, h and dh rounded to it. Where that is the base's, each is rounded
// once, into its place; else x and dy are copied, and what becomes of them passes through a
// temporary.
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

// Rows that are worked on together.
struct Block {
  int64_t first, rows;
  const LoraDropout* dropout;  // of these rows of x, or null
  KeepRows* keep_rows;
  Tensor mask;  // without keep_rows

  Tensor of(const Tensor& all) const { return all.narrow(0, first, rows); }

  // These rows of x or dy in `dtype`, without what dropout drops. What is kept is not scaled: that
  // is left to the products, which round later.
  Tensor operand(const Tensor& all, at::ScalarType dtype) const {
    const Tensor in = of(all);
    if (!dropout) return in.to(dtype);
    if (mask.defined()) return at::where(mask, in, at::zeros({}, in.options())).to(dtype);
    const bool converts = in.scalar_type() != dtype;
    const Tensor out = converts ? in.to(dtype) : at::empty(in.sizes(), in.options());
    keep_rows(out, converts ? out : in, *dropout->rng_state, dropout->p, first);
    return out;
  }

  // What is dropped of `values` becomes 0.
  void drop_(const Tensor& values) const {
    if (mask.defined()) {
      values.mul_(mask);
    } else if (dropout) {
      keep_rows(values, values, *dropout->rng_state, dropout->p, first);
    }
  }
};

// f(block) for all rows of `all`, at once or in blocks; dropout: of x, or null.
template <class F>
void for_each_block(const Tensor& all, int64_t columns, const LoraDropout* dropout,
                    at::ScalarType dtype, const LowRankProducts& products, const F& f) {
  constexpr int64_t kBlockElements = int64_t{1} << 22;
  const bool drops = dropout && dropout->enabled();
  const bool copies = products.block_elements.has_value() && all.scalar_type() != dtype;
  const int64_t M = all.size(0), elements = products.block_elements.value_or(kBlockElements);
  const int64_t size =
      drops || copies ? std::max<int64_t>(1, elements / std::max<int64_t>(1, columns)) : M;
  for (int64_t first = 0; first < M; first += size) {
    Block block{
        first, std::min(size, M - first), drops ? dropout : nullptr, products.keep_rows, {}};
    if (drops && !products.keep_rows) {
      block.mask = dropout_mask(*dropout->rng_state, block.rows, columns, dropout->p, first);
    }
    f(block);
  }
}

// factor times a sum over the rows of all blocks; of several it is made in the compute type.
struct SumOfBlocks {
  Tensor result;  // or undefined
  double factor;
  Tensor sum = {};

  // += a b, of the rows of one block of M
  void add(const Tensor& a, const Tensor& b, int64_t M) {
    if (a.size(1) == M) return scaled_mm_out(result, a, b, factor);
    const auto compute = at::toOpMathType(a.scalar_type());
    const bool first = !sum.defined();
    if (first) {
      const bool in_place = result.scalar_type() == compute;
      sum = in_place ? result : at::empty(result.sizes(), result.options().dtype(compute));
    }
    if (a.scalar_type() == compute) {
      at::addmm_out(sum, sum, a, b, /*beta=*/first ? 0 : 1, /*alpha=*/factor);
    } else if (first) {
      sum.copy_(at::mm(a, b)).mul_(factor);
    } else {
      sum.add_(at::mm(a, b), factor);
    }
  }
  void finish() const {
    if (sum.defined() && !sum.is_same(result)) result.copy_(sum);
  }
};

// h [M, r] = dropout(x) A^T in the dtype of A; in `out`, if that is defined, in its own.
Tensor down(const Tensor& x, const Tensor& A, const LoraDropout& dropout,
            const LowRankProducts& products, const Tensor& out = {}) {
  const auto dtype = A.scalar_type();
  const bool in_place = out.defined() && out.scalar_type() == dtype;
  const Tensor h = in_place ? out : at::empty({x.size(0), A.size(0)}, A.options());
  for_each_block(x, x.size(1), &dropout, dtype, products, [&](const Block& block) {
    scaled_mm_out(block.of(h), block.operand(x, dtype), A.t(), dropout.survivor());
  });
  if (out.defined() && !in_place) out.copy_(h);
  return h;
}

}  // namespace

void low_rank_forward_blas(const LowRankForward& problem, const LowRankProducts& products) {
  const Tensor& y = problem.y;
  const HiddenScale& scaling = problem.scaling;
  const auto dtype = products.dtype.value_or(problem.lora_A.scalar_type());
  const Tensor A = problem.lora_A.to(dtype), B = problem.lora_B.to(dtype);
  const Tensor h = rescaled(down(problem.x, A, problem.dropout, products, problem.h), scaling);
  for_each_block(y, y.size(1), nullptr, dtype, products, [&](const Block& block) {
    scaled_mm_out(block.of(y), block.of(h), B.t(), scaling.number, problem.bias);
  });
}

void low_rank_backward_blas(const LowRankBackward& problem, const LowRankProducts& products) {
  const Tensor &dy = problem.dy, &x = problem.x;
  const int64_t M = dy.size(0), N = dy.size(1), K = problem.lora_A.size(1);
  const HiddenScale& scaling = problem.scaling;
  const LoraDropout& dropout = problem.dropout;
  const double factor = scaling.number * dropout.survivor();
  const auto dtype = products.dtype.value_or(problem.lora_A.scalar_type());
  const Tensor A = problem.lora_A.to(dtype), B = problem.lora_B.to(dtype);
  const bool wants_dh = problem.dA.defined() || problem.dx.defined();
  const bool makes_h = problem.dB.defined() && !problem.h.defined();

  Tensor h, dh;
  if (problem.dB.defined() && !makes_h) h = rescaled(problem.h.to(dtype), scaling);
  if (wants_dh) dh = at::empty({M, A.size(0)}, A.options());
  SumOfBlocks dB{problem.dB, scaling.number}, dA{problem.dA, factor};
  const auto of_dy = [&](const Block& block) {
    const Tensor rows = block.operand(dy, dtype);
    if (h.defined()) dB.add(rows.t(), block.of(h), M);
    if (wants_dh) scaled_mm_out(block.of(dh), rows, B, 1.0);
  };
  if (h.defined() || wants_dh) for_each_block(dy, N, nullptr, dtype, products, of_dy);
  if (wants_dh) dh = rescaled(dh, scaling);  // by the numbers where it is used

  const auto of_x = [&](const Block& block) {
    const Tensor d = problem.dA.defined() || makes_h ? block.operand(x, dtype) : Tensor();
    if (makes_h) {
      const Tensor own_h = at::empty({block.rows, A.size(0)}, A.options());
      scaled_mm_out(own_h, d, A.t(), dropout.survivor());
      dB.add(block.of(dy).to(dtype).t(), rescaled(own_h, scaling), M);
    }
    if (problem.dA.defined()) dA.add(block.of(dh).t(), d, M);
    if (problem.dx.defined()) {
      const Tensor dx = block.of(problem.dx);
      scaled_mm_out(dx, block.of(dh), A, factor);
      block.drop_(dx);
    }
  };
  if (makes_h || wants_dh) for_each_block(dy, K, &dropout, dtype, products, of_x);
  dA.finish();
  dB.finish();
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
