// lora_linear on CUDA. A 16-bit base on a GPU from sm_80 on runs the kernels of csrc/kernels;
// anything else is composed of ATen's products, with the same dropout mask.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../common/dropout.h"
#include "cuda/path.h"
#include "kernels/lora_linear.h"
#include "ops/checks.h"
#include "ops/dropout.h"
#include "ops/rows.h"

namespace lora_ext {
namespace {

// Scratch in torch's caching allocator, freed for later work of the same stream.
struct Scratch {
  at::TensorOptions options;
  std::vector<Tensor> blocks;

  static void* allocate(void* context, int64_t bytes) {
    auto* self = static_cast<Scratch*>(context);
    self->blocks.push_back(
        at::empty({std::max<int64_t>(bytes, 1)}, self->options.dtype(at::kByte)));
    return self->blocks.back().data_ptr();
  }
  Allocator allocator() { return {allocate, this}; }
};

int current_capability() {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  return device->major * 10 + device->minor;
}

CudaPath path_for(const Tensor& base, int64_t r) {
  CudaProblem problem{};
  problem.half = base.scalar_type() == at::kHalf || base.scalar_type() == at::kBFloat16;
  problem.compute_capability = current_capability();
  problem.rank = r;
  return choose_cuda_path(problem);
}

Dropout dropout_of(double dropout_p, const OptionalTensor& rng_state, Tensor& keep_alive) {
  if (dropout_p == 0.0) return {false, 0, 1.0f, nullptr};
  keep_alive = rng_state->contiguous();
  return {true, dropout_threshold(dropout_p), static_cast<float>(dropout_scale(dropout_p)),
          keep_alive.const_data_ptr<int64_t>()};
}

template <class T>
Matrix<T> matrix(const Tensor& rows) {
  return {static_cast<const T*>(rows.const_data_ptr()), rows.size(0), rows.size(1), rows.stride(0)};
}

// f(T{}, TA{}) with the storage types of base and adapter.
template <class F>
void with_types(at::ScalarType base, at::ScalarType adapter, const F& f) {
  const bool mixed = adapter == at::kFloat;
  if (base == at::kBFloat16) return mixed ? f(Bf16{}, float{}) : f(Bf16{}, Bf16{});
  mixed ? f(Fp16{}, float{}) : f(Fp16{}, Fp16{});
}

// x without its dropped elements, scaled, in the adapters' dtype.
Tensor dropped(const Tensor& x, const Tensor& lora_A, double dropout_p,
               const OptionalTensor& rng_state) {
  const Tensor adapter_x = x.to(lora_A.scalar_type());
  if (dropout_p == 0.0) return adapter_x;
  return adapter_x * dropout_mask(*rng_state, x.size(0), x.size(1), dropout_p) *
         dropout_scale(dropout_p);
}

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& x, const Tensor& weight,
                                    const OptionalTensor& bias, const Tensor& lora_A,
                                    const Tensor& lora_B, const OptionalTensor& lora_bias,
                                    double scaling, const OptionalTensor& scaling_tensor,
                                    double dropout_p, const OptionalTensor& rng_state,
                                    bool return_h) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, lora_bias,
                    {scaling, scaling_tensor, dropout_p, rng_state});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = as_rows(x);
  const int64_t M = rows.size(0), N = weight.size(0), r = lora_A.size(0);
  auto y_sizes = x.sizes().vec();
  y_sizes.back() = N;
  const auto h_options = lora_A.options().dtype(at::toOpMathType(lora_A.scalar_type()));
  if (M == 0 || N == 0) {
    return {at::empty(y_sizes, x.options()), at::zeros({return_h ? M : 0, r}, h_options)};
  }
  const double s = scaling_of(scaling, scaling_tensor);
  const CudaPath path = path_for(x, r);
  if (!path.fused || rows.size(1) == 0) {
    const Tensor h = at::mm(dropped(rows, lora_A, dropout_p, rng_state), lora_A.t());
    Tensor y = (at::mm(h, lora_B.t()) * s).to(x.scalar_type());
    const Tensor both = total_bias(bias, lora_bias, s, x.scalar_type());
    if (both.defined()) y.add_(both);
    y.addmm_(rows, weight.t());
    return {y.view(y_sizes), return_h ? h.to(h_options.dtype()) : at::empty({0}, h_options)};
  }
  Tensor y = at::empty(y_sizes, x.options());
  Tensor h = return_h ? at::empty({M, r}, h_options) : at::empty({0}, h_options);
  const Tensor weight_rows = as_rows(weight), A = lora_A.contiguous(), B = lora_B.contiguous();
  const Tensor both = total_bias(bias, lora_bias, s, at::kFloat);
  Tensor state;
  Scratch scratch{x.options(), {}};
  with_types(x.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const ForwardCall<T, TA> call{matrix<T>(rows),
                                  matrix<T>(weight_rows),
                                  both.defined() ? both.const_data_ptr<float>() : nullptr,
                                  static_cast<const TA*>(A.const_data_ptr()),
                                  static_cast<const TA*>(B.const_data_ptr()),
                                  static_cast<int>(r),
                                  static_cast<float>(s),
                                  nullptr,
                                  dropout_of(dropout_p, rng_state, state),
                                  static_cast<T*>(y.data_ptr()),
                                  return_h ? h.data_ptr<float>() : nullptr};
    run_forward(call, scratch.allocator(), at::cuda::getCurrentCUDAStream(), current_capability());
  });
  return {y, h};
}

Gradients bwd_cuda(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                   const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                   double scaling, const OptionalTensor& scaling_tensor, double dropout_p,
                   const OptionalTensor& rng_state, GradientMask mask) {
  check_lora_linear_bwd(dy, x, h, weight, lora_A, lora_B,
                        {scaling, scaling_tensor, dropout_p, rng_state}, mask);
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor dy_rows = as_rows(dy), x_rows = x.has_value() ? as_rows(*x) : Tensor();
  const int64_t M = dy_rows.size(0), N = dy_rows.size(1), K = lora_A.size(1), r = lora_A.size(0);
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
  if (!mask[kGradX] && !mask[kGradA] && !mask[kGradB]) {
    return {dx, dweight, dbias, dA, dB, dlora_bias};
  }

  const CudaPath path = path_for(dy, r);
  if (!path.fused || K == 0 || N == 0) {
    const Tensor adapter_dy = dy_rows.to(lora_A.scalar_type());
    const Tensor dh = at::mm(adapter_dy, lora_B) * s;
    const bool reads_x = mask[kGradA] || (mask[kGradB] && !h.has_value());
    const Tensor kept = reads_x ? dropped(x_rows, lora_A, dropout_p, rng_state) : Tensor();
    if (mask[kGradA]) dA = at::mm(dh.t(), kept);
    if (mask[kGradB]) {
      const Tensor hidden = h.has_value() ? h->to(lora_A.scalar_type()) : at::mm(kept, lora_A.t());
      dB = at::mm(adapter_dy.t(), hidden) * s;
    }
    if (mask[kGradX]) {
      const Tensor low_rank = at::mm(dh, lora_A);
      Tensor dx_rows = dropped(low_rank, lora_A, dropout_p, rng_state).to(dy.scalar_type());
      dx_rows.addmm_(dy_rows, *weight);
      dx = dx_rows.view(dx_sizes);
    }
    return {dx, dweight, dbias, dA, dB, dlora_bias};
  }
  const Tensor weight_rows = mask[kGradX] ? as_rows(*weight) : Tensor();
  const Tensor A = lora_A.contiguous(), B = lora_B.contiguous();
  const Tensor saved_h = h.has_value() ? h->contiguous() : Tensor();
  Tensor state;
  Scratch scratch{dy.options(), {}};
  with_types(dy.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const auto out = [](bool wanted, Tensor& tensor) {
      return wanted ? tensor.data_ptr() : nullptr;
    };
    const BackwardCall<T, TA> call{
        matrix<T>(dy_rows),
        x_rows.defined() ? matrix<T>(x_rows) : Matrix<T>{nullptr, M, K, K},
        mask[kGradX] ? matrix<T>(weight_rows) : Matrix<T>{nullptr, N, K, K},
        saved_h.defined() ? saved_h.const_data_ptr<float>() : nullptr,
        static_cast<const TA*>(A.const_data_ptr()),
        static_cast<const TA*>(B.const_data_ptr()),
        static_cast<int>(r),
        static_cast<float>(s),
        nullptr,
        dropout_of(dropout_p, rng_state, state),
        static_cast<T*>(out(mask[kGradX], dx)),
        static_cast<TA*>(out(mask[kGradA], dA)),
        static_cast<TA*>(out(mask[kGradB], dB))};
    run_backward(call, scratch.allocator(), at::cuda::getCurrentCUDAStream(), current_capability());
  });
  return {dx, dweight, dbias, dA, dB, dlora_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear_fwd", &fwd_cuda);
  m.impl("lora_linear_bwd", &bwd_cuda);
}

}  // namespace lora_ext
