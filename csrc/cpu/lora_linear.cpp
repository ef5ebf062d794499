// lora_linear on the CPU. The vector kernels write the low-rank part into y and dx; then ATen's BLAS
// adds the base product with beta = 1, in fp32 accumulators, so that results are rounded once.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/backend.h"
#include "cpu/path.h"
#include "ops/checks.h"

namespace lora_ext {
namespace {

double scaling_of(double scaling, const OptionalTensor& scaling_tensor) {
  return scaling_tensor.has_value() ? scaling * scaling_tensor->item<double>() : scaling;
}

CpuPath path_for(int64_t M, int64_t N, int64_t K, int64_t r, at::ScalarType compute) {
  return choose_cpu_path(M, N, K, r, at::get_num_threads(), c10::elementSize(compute));
}

// bias + scaling * lora_bias in the compute type; undefined if there is neither.
Tensor total_bias(const OptionalTensor& bias, const OptionalTensor& lora_bias, double scaling,
                  at::ScalarType compute) {
  Tensor total;
  if (bias.has_value()) total = bias->to(compute);
  if (lora_bias.has_value()) {
    const Tensor scaled = lora_bias->to(compute) * scaling;
    total = total.defined() ? total + scaled : scaled;
  }
  return total.defined() ? total.contiguous() : total;
}

Tensor transposed_b(const LoraLinearKernels& kernels, const Tensor& lora_B,
                    at::ScalarType compute) {
  const int64_t N = lora_B.size(0), r = lora_B.size(1);
  Tensor result = at::empty({r, N}, lora_B.options().dtype(compute));
  at::parallel_for(0, N, 1024, [&](int64_t begin, int64_t end) {
    kernels.transpose_b(lora_B.const_data_ptr(), N, r, begin, end, result.data_ptr());
  });
  return result;
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& lora_A_in,
                                   const Tensor& lora_B_in, const OptionalTensor& lora_bias,
                                   double scaling, const OptionalTensor& scaling_tensor,
                                   double dropout_p, const OptionalTensor& rng_state,
                                   bool return_h) {
  check_lora_linear(x, weight, bias, lora_A_in, lora_B_in, lora_bias,
                    {scaling, scaling_tensor, dropout_p, rng_state});
  const Tensor rows = as_rows(x), lora_A = lora_A_in.contiguous(), lora_B = lora_B_in.contiguous();
  const int64_t M = rows.size(0), K = rows.size(1), N = weight.size(0), r = lora_A.size(0);
  const auto compute = at::toOpMathType(x.scalar_type());
  const auto& kernels = kernels_for(x.scalar_type(), lora_A.scalar_type());
  const double s = scaling_of(scaling, scaling_tensor);

  auto y_sizes = x.sizes().vec();
  y_sizes.back() = N;
  Tensor y = at::empty(y_sizes, x.options());
  Tensor h = return_h ? at::empty({M, r}, lora_A.options()) : at::empty({0}, lora_A.options());
  if (y.numel() == 0) return {y, h.zero_()};

  const Tensor bias_row = total_bias(bias, lora_bias, s, compute);
  const CpuPath path = path_for(M, N, K, r, compute);
  const Tensor B_t = path.transpose_B ? transposed_b(kernels, lora_B, compute) : Tensor();
  const ForwardArgs args{K, N, r, rows.const_data_ptr(), row_stride(rows),
                         lora_A.const_data_ptr(), lora_B.const_data_ptr(), data_or_null(B_t),
                         data_or_null(bias_row), s, dropout_args(dropout_p, rng_state),
                         y.data_ptr(), return_h ? h.data_ptr() : nullptr};
  const int64_t parts = path.fwd_parts, bytes = kernels.scratch_bytes(K, r);
  Tensor scratch = at::empty({parts, bytes}, bytes_on_cpu());
  parallel_parts(M, parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.forward_rows(args, begin, end, scratch.data_ptr<uint8_t>() + part * bytes);
  });
  y.view({M, N}).addmm_(rows, weight.t());
  return {y, h};
}

// Per-part sums of one adapter gradient, added up in a fixed order.
struct PartialSums {
  Tensor parts;  // [parts, rows, columns] compute type, undefined if not wanted
  Tensor result;

  PartialSums(bool wanted, int64_t count, const Tensor& like, at::ScalarType compute)
      : result(at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, like.options())) {
    if (!wanted) return;
    const bool in_place = count == 1 && compute == like.scalar_type();
    parts = in_place ? result.unsqueeze(0)
                     : at::empty({count, like.size(0), like.size(1)}, like.options().dtype(compute));
  }

  void* part(int64_t index) const {
    if (!parts.defined()) return nullptr;
    return static_cast<char*>(parts.data_ptr()) + index * parts.stride(0) * parts.element_size();
  }

  void reduce(const LoraLinearKernels& kernels, double scale) const {
    if (!parts.defined() || (parts.is_alias_of(result) && scale == 1.0)) return;
    at::parallel_for(0, result.numel(), 8192, [&](int64_t begin, int64_t end) {
      kernels.reduce(parts.const_data_ptr(), parts.size(0), parts.stride(0), scale, begin, end,
                     result.data_ptr());
    });
  }
};

Gradients bwd_cpu(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                  const OptionalTensor& weight, const Tensor& lora_A_in, const Tensor& lora_B_in,
                  double scaling, const OptionalTensor& scaling_tensor, double dropout_p,
                  const OptionalTensor& rng_state, GradientMask mask) {
  check_lora_linear_bwd(dy, x, h, weight, lora_A_in, lora_B_in,
                        {scaling, scaling_tensor, dropout_p, rng_state}, mask);
  const Tensor dy_rows = as_rows(dy), x_rows = x.has_value() ? as_rows(*x) : Tensor(),
               h_rows = h.has_value() ? h->contiguous() : Tensor(),
               lora_A = lora_A_in.contiguous(), lora_B = lora_B_in.contiguous();
  const int64_t M = dy_rows.size(0), N = dy_rows.size(1), K = lora_A.size(1), r = lora_A.size(0);
  const auto compute = at::toOpMathType(dy.scalar_type());
  const auto& kernels = kernels_for(dy.scalar_type(), lora_A.scalar_type());
  const double s = scaling_of(scaling, scaling_tensor);

  auto dx_sizes = dy.sizes().vec();
  dx_sizes.back() = K;
  Tensor dx = at::empty(mask[kGradX] ? at::IntArrayRef(dx_sizes) : at::IntArrayRef{0},
                        dy.options());
  Tensor dweight = mask[kGradWeight] ? at::mm(dy_rows.t(), x_rows) : at::empty({0}, dy.options());
  Tensor dbias = at::empty({0}, dy.options()), dlora_bias = at::empty({0}, lora_B.options());
  if (mask[kGradBias] || mask[kGradLoraBias]) {
    const Tensor sum = dy_rows.sum(0, false, compute);
    if (mask[kGradBias]) dbias = sum.to(dy.scalar_type());
    if (mask[kGradLoraBias]) dlora_bias = (sum * s).to(lora_B.scalar_type());
  }

  const int64_t parts = path_for(M, N, K, r, compute).bwd_parts;
  const PartialSums dA(mask[kGradA], parts, lora_A, compute);
  const PartialSums dB(mask[kGradB], parts, lora_B, compute);
  if (M == 0) return {dx, dweight, dbias, dA.result.zero_(), dB.result.zero_(), dlora_bias};

  if (mask[kGradX] || mask[kGradA] || mask[kGradB]) {
    const BackwardArgs args{K, N, r, dy_rows.const_data_ptr(), row_stride(dy_rows),
                            data_or_null(x_rows), x_rows.defined() ? row_stride(x_rows) : 0,
                            data_or_null(h_rows), lora_A.const_data_ptr(),
                            lora_B.const_data_ptr(), s, dropout_args(dropout_p, rng_state),
                            mask[kGradX] ? dx.data_ptr() : nullptr};
    const int64_t bytes = kernels.scratch_bytes(K, r);
    Tensor scratch = at::empty({parts, bytes}, bytes_on_cpu());
    parallel_parts(M, parts, [&](int64_t part, int64_t begin, int64_t end) {
      kernels.backward_rows(args, begin, end, dA.part(part), dB.part(part),
                            scratch.data_ptr<uint8_t>() + part * bytes);
    });
  }
  dA.reduce(kernels, 1.0);
  dB.reduce(kernels, s);
  if (mask[kGradX] && dx.numel() > 0) dx.view({M, K}).addmm_(dy_rows, *weight);
  return {dx, dweight, dbias, dA.result, dB.result, dlora_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_fwd", &fwd_cpu);
  m.impl("lora_linear_bwd", &bwd_cpu);
}

}  // namespace lora_ext
