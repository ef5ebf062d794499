#include <ATen/ATen.h>

#include <string_view>

#include "cpu/low_rank.h"

namespace lora_ext {
namespace {

// out = scale * a b, rounded once
void scaled_mm_out(const Tensor& out, const Tensor& a, const Tensor& b, double scale) {
  Tensor result = out;
  at::addmm_out(result, result, a, b, /*beta=*/0, /*alpha=*/scale);
}

}  // namespace

bool has_fast_blas(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kDouble) return true;
  // oneDNN's bf16 product needs AVX-512; ATen's fallback, and all of its fp16, is scalar code.
  return dtype == at::kBFloat16 && std::string_view(cpu_kernels().name) == "avx512";
}

void low_rank_forward_blas(const LowRankForward& problem) {
  Tensor h = problem.h.defined()
                 ? problem.h
                 : at::empty({problem.x.size(0), problem.lora_A.size(0)}, problem.x.options());
  at::mm_out(h, problem.x, problem.lora_A.t());
  if (problem.bias.defined()) {
    Tensor y = problem.y;
    at::addmm_out(y, problem.bias.to(y.scalar_type()), h, problem.lora_B.t(), 1, problem.scaling);
  } else {
    scaled_mm_out(problem.y, h, problem.lora_B.t(), problem.scaling);
  }
}

void low_rank_backward_blas(const LowRankBackward& problem) {
  const double s = problem.scaling;
  if (problem.dB.defined()) {
    const Tensor h = problem.h.defined() ? problem.h : at::mm(problem.x, problem.lora_A.t());
    scaled_mm_out(problem.dB, problem.dy.t(), h, s);
  }
  if (!problem.dA.defined() && !problem.dx.defined()) return;
  const Tensor dh = at::mm(problem.dy, problem.lora_B);  // scaled by s where it is used
  if (problem.dA.defined()) scaled_mm_out(problem.dA, dh.t(), problem.x, s);
  if (problem.dx.defined()) scaled_mm_out(problem.dx, dh, problem.lora_A, s);
}

}  // namespace lora_ext
