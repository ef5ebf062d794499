// lora_linear on the CPU. The low-rank part is written into y and dx; then ATen's BLAS adds the
// base product with beta = 1, in fp32 accumulators, so that results are rounded to their dtype
// once.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/backend.h"
#include "cpu/low_rank.h"
#include "ops/checks.h"

namespace lora_ext {
namespace {

CpuPath path_for(int64_t M, int64_t N, const Tensor& lora_A, at::ScalarType base, bool dropout) {
  CpuProblem problem{};
  problem.M = M, problem.N = N, problem.K = lora_A.size(1), problem.r = lora_A.size(0);
  problem.dropout = dropout;
  problem.mixed = lora_A.scalar_type() != base;
  problem.bf16 = base == at::kBFloat16 && !problem.mixed;
  problem.bf16_dot = bf16_dot_kernels() != nullptr;
  problem.fast_blas = has_fast_blas(base);
  problem.compute_bytes = c10::elementSize(at::toOpMathType(base));
  problem.threads = at::get_num_threads();
  return choose_cpu_path(problem);
}

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& lora_A,
                                   const Tensor& lora_B, const OptionalTensor& lora_bias,
                                   double scaling, const OptionalTensor& scaling_tensor,
                                   double dropout_p, const OptionalTensor& rng_state,
                                   bool return_h) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, lora_bias,
                    {scaling, scaling_tensor, dropout_p, rng_state});
  const Tensor rows = as_rows(x);
  const int64_t M = rows.size(0), N = weight.size(0), r = lora_A.size(0);
  auto y_sizes = x.sizes().vec();
  y_sizes.back() = N;
  Tensor y = at::empty(y_sizes, x.options());
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const auto h_options = lora_A.options().dtype(compute);
  Tensor h = return_h ? at::empty({M, r}, h_options) : at::empty({0}, h_options);
  if (y.numel() == 0) return {y, h.zero_()};

  const double s = scaling_of(scaling, scaling_tensor);
  Tensor y_rows = y.view({M, N});
  LowRankForward low_rank{rows,
                          lora_A.contiguous(),
                          lora_B.contiguous(),
                          total_bias(bias, lora_bias, s, compute),
                          s,
                          dropout_args(dropout_p, rng_state),
                          y_rows,
                          return_h ? h : Tensor()};
  const CpuPath path = path_for(M, N, lora_A, x.scalar_type(), dropout_p > 0.0);
  if (path.kernels == CpuPath::Kernels::Blas) {
    low_rank_forward_blas(low_rank);
  } else {
    low_rank_forward_fused(low_rank, path);
  }
  y_rows.addmm_(rows, weight.t());
  return {y, h};
}

Gradients bwd_cpu(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                  const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                  double scaling, const OptionalTensor& scaling_tensor, double dropout_p,
                  const OptionalTensor& rng_state, GradientMask mask) {
  check_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B,
                        {scaling, scaling_tensor, dropout_p, rng_state}, mask);
  const Tensor dy_rows = as_rows(dy), x_rows = x.has_value() ? as_rows(*x) : Tensor();
  const int64_t M = dy_rows.size(0), N = dy_rows.size(1), K = lora_A.size(1);
  const double s = scaling_of(scaling, scaling_tensor);
  const auto gradient = [](bool wanted, const Tensor& like, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, like.options());
  };
  auto dx_sizes = dy.sizes().vec();
  dx_sizes.back() = K;
  Tensor dx = gradient(mask[kGradX], dy, dx_sizes);
  Tensor dA = gradient(mask[kGradA], lora_A, lora_A.sizes());
  Tensor dB = gradient(mask[kGradB], lora_B, lora_B.sizes());
  Tensor dweight = mask[kGradWeight] ? at::mm(dy_rows.t(), x_rows) : gradient(false, dy, {});
  Tensor dbias = gradient(false, dy, {}), dlora_bias = gradient(false, lora_B, {});
  if (mask[kGradBias] || mask[kGradLoraBias]) {
    const Tensor sum = dy_rows.sum(0, false, at::toOpMathType(dy.scalar_type()));
    if (mask[kGradBias]) dbias = sum.to(dy.scalar_type());
    if (mask[kGradLoraBias]) dlora_bias = (sum * s).to(lora_B.scalar_type());
  }
  if (M == 0) return {dx, dweight, dbias, dA.zero_(), dB.zero_(), dlora_bias};

  Tensor dx_rows = mask[kGradX] ? dx.view({M, K}) : Tensor();
  if (mask[kGradX] || mask[kGradA] || mask[kGradB]) {
    LowRankBackward low_rank{dy_rows,
                             x_rows,
                             h.has_value() ? h->contiguous() : Tensor(),
                             lora_A.contiguous(),
                             lora_B.contiguous(),
                             s,
                             dropout_args(dropout_p, rng_state),
                             dx_rows,
                             mask[kGradA] ? dA : Tensor(),
                             mask[kGradB] ? dB : Tensor()};
    const CpuPath path = path_for(M, N, lora_A, dy.scalar_type(), dropout_p > 0.0);
    if (path.kernels == CpuPath::Kernels::Blas) {
      low_rank_backward_blas(low_rank);
    } else {
      low_rank_backward_fused(low_rank, path);
    }
  }
  if (mask[kGradX]) dx_rows.addmm_(dy_rows, *weight);
  return {dx, dweight, dbias, dA, dB, dlora_bias};
}

}  // namespace

std::pair<std::string, std::string> explain_lora_linear_cpu(int64_t tokens, int64_t out_features,
                                                            const Tensor& lora_A,
                                                            at::ScalarType base, double dropout_p) {
  const CpuPath path = path_for(tokens, out_features, lora_A, base, dropout_p > 0.0);
  if (path.kernels == CpuPath::Kernels::Blas) return {"cpu blas", path.reason};
  const CpuCapability capability = path.kernels == CpuPath::Kernels::Bf16Dot
                                       ? CpuCapability::Avx512Bf16
                                       : std::min(cpu_capability(), CpuCapability::Avx512);
  return {std::string("cpu fused ") + cpu_capability_name(capability), path.reason};
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_fwd", &fwd_cpu);
  m.impl("lora_linear_bwd", &bwd_cpu);
}

}  // namespace lora_ext
