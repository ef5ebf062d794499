#include <ATen/ATen.h>

#include "cpu/low_rank.h"

namespace lora_ext {
namespace {

// out = scale * a b, rounded once
void scaled_mm_out(const Tensor& out, const Tensor& a, const Tensor& b, double scale) {
  Tensor result = out;
  at::addmm_out(result, result, a, b, /*beta=*/0, /*alpha=*/scale);
}

// bool [rows, columns], or undefined without dropout.
Tensor keep_mask(const DropoutArgs& dropout, int64_t rows, int64_t columns) {
  if (!dropout.enabled) return {};
  Tensor keep = at::empty({rows, columns}, at::kBool);
  cpu_kernels().dropout_mask_rows(dropout.rng, dropout.threshold, columns, 0, rows,
                                  reinterpret_cast<uint8_t*>(keep.data_ptr<bool>()));
  return keep;
}

// The elements of x that are kept, not scaled: that is left to the products, which round later.
Tensor kept(const Tensor& x, const Tensor& keep) {
  return keep.defined() ? at::where(keep, x, at::zeros({}, x.options())) : x;
}

double survivor_scale(const DropoutArgs& dropout) { return dropout.enabled ? dropout.scale : 1.0; }

}  // namespace

bool has_fast_blas(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kDouble) return true;
  // oneDNN's bf16 product needs AVX-512; ATen's fallback, and all of its fp16, is scalar code.
  return dtype == at::kBFloat16 && cpu_capability() >= CpuCapability::Avx512;
}

void low_rank_forward_blas(const LowRankForward& problem) {
  const int64_t M = problem.x.size(0), K = problem.x.size(1), r = problem.lora_A.size(0);
  const Tensor h = at::empty({M, r}, problem.x.options());
  const Tensor x = kept(problem.x, keep_mask(problem.dropout, M, K));
  scaled_mm_out(h, x, problem.lora_A.t(), survivor_scale(problem.dropout));
  if (problem.h.defined()) problem.h.copy_(h);
  if (problem.bias.defined()) {
    Tensor y = problem.y;
    at::addmm_out(y, problem.bias.to(y.scalar_type()), h, problem.lora_B.t(), 1, problem.scaling);
  } else {
    scaled_mm_out(problem.y, h, problem.lora_B.t(), problem.scaling);
  }
}

void low_rank_backward_blas(const LowRankBackward& problem) {
  const int64_t M = problem.dy.size(0), K = problem.lora_A.size(1), r = problem.lora_A.size(0);
  const double s = problem.scaling, survivor = survivor_scale(problem.dropout);
  const Tensor keep = keep_mask(problem.dropout, M, K);
  const bool make_h = problem.dB.defined() && !problem.h.defined();
  const Tensor x = make_h || problem.dA.defined() ? kept(problem.x, keep) : Tensor();
  if (problem.dB.defined()) {
    const Tensor h =
        make_h ? at::empty({M, r}, problem.dy.options()) : problem.h.to(problem.dy.scalar_type());
    if (make_h) scaled_mm_out(h, x, problem.lora_A.t(), survivor);
    scaled_mm_out(problem.dB, problem.dy.t(), h, s);
  }
  if (!problem.dA.defined() && !problem.dx.defined()) return;
  const Tensor dh = at::mm(problem.dy, problem.lora_B);  // scaled where it is used
  if (problem.dA.defined()) scaled_mm_out(problem.dA, dh.t(), x, s * survivor);
  if (problem.dx.defined()) {
    scaled_mm_out(problem.dx, dh, problem.lora_A, s * survivor);
    if (keep.defined()) problem.dx.mul_(keep);
  }
}

}  // namespace lora_ext
