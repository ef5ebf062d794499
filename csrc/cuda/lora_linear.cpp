// lora_linear on CUDA, by the kernels of csrc/kernels or composed of ATen's products;
// lora_linear_path.h chooses.
#include "cuda/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../common/dropout.h"
#include "cuda/operands.h"
#include "cuda/trust.h"
#include "kernels/lora_linear.h"
#include "ops/base_product.h"
#include "ops/lora_linear_blas.h"
#include "ops/operator.h"
#include "ops/print_path.h"

namespace lora_ext {
namespace {

// Scaling and dropout as the kernels take them, with the tensors that they point into. Nothing is
// read from the device, so that a CUDA graph can capture a call.
struct KernelOptions {
  Tensor scaling_tensor, rng_state;
  float scaling;
  const float* scaling_factor = nullptr;
  Dropout dropout{false, 0, 1.0f, nullptr};

  KernelOptions(const HiddenScale& given, const LoraDropout& of_x)
      : scaling(static_cast<float>(given.number)) {
    if (given.tensor.has_value()) {
      scaling_tensor = given.tensor->to(at::kFloat);
      scaling_factor = scaling_tensor.const_data_ptr<float>();
    }
    if (!of_x.enabled()) return;
    rng_state = of_x.rng_state->contiguous();
    dropout = {true, dropout_threshold(of_x.p), static_cast<float>(of_x.survivor()),
               rng_state.const_data_ptr<int64_t>()};
  }
};

// Whether the weight [N, K] lies as [K, N], as GPT-2's Conv1D keeps it.
bool lies_transposed(const Tensor& weight) {
  return weight.stride(1) != 1 && weight.stride(0) == 1;
}

// The weight [N, K] as it lies, copied only if it lies neither way; without data if there is none.
template <class T>
Weight<T> weight_of(const Tensor& weight, int64_t N, int64_t K) {
  if (weight.defined() && lies_transposed(weight)) return {matrix<T>(weight.t()), true};
  return {matrix<T>(weight, N, K), false};
}

// f(T{}, TA{}) with the storage types of base and adapter.
template <class F>
void with_types(at::ScalarType base, at::ScalarType adapter, const F& f) {
  const bool mixed = adapter == at::kFloat;
  if (base == at::kBFloat16) return mixed ? f(Bf16{}, float{}) : f(Bf16{}, Bf16{});
  mixed ? f(Fp16{}, float{}) : f(Fp16{}, Fp16{});
}

// What the kernels are given as the weight: itself, or a copy where neither rows nor columns lie
// together.
Tensor readable(const Tensor& weight) { return lies_transposed(weight) ? weight : as_rows(weight); }

// The bias, which kernels read in pairs: a copy where a view of it begins between two.
Tensor in_pairs(const Tensor& bias) {
  const bool aligned = reinterpret_cast<uintptr_t>(data_or_null(bias)) % (2 * sizeof(float)) == 0;
  return aligned ? bias : bias.clone();
}

// The low-rank part into y; the base product too if there is a weight [N, K].
void run_kernels(const LowRankForward& problem, const Tensor& weight, KernelFamily family) {
  const KernelOptions options(problem.scaling, problem.dropout);
  CudaScratch scratch(problem.x.options());
  const auto& [x, lora_A, lora_B] = std::tie(problem.x, problem.lora_A, problem.lora_B);
  const Tensor bias = in_pairs(problem.bias);
  with_types(x.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const ForwardCall<T, TA> call{.x = matrix<T>(x),
                                  .weight = weight_of<T>(weight, lora_B.size(0), x.size(1)),
                                  .bias = data_or_null<float>(bias),
                                  .lora_A = data_or_null<TA>(problem.lora_A),
                                  .lora_B = data_or_null<TA>(problem.lora_B),
                                  .r = static_cast<int>(lora_A.size(0)),
                                  .scaling = options.scaling,
                                  .scaling_factor = options.scaling_factor,
                                  .dropout = options.dropout,
                                  .y = out_or_null<T>(problem.y),
                                  .h = out_or_null<float>(problem.h)};
    run_forward(call, scratch.allocator(), at::cuda::getCurrentCUDAStream(), family);
  });
}

// The low-rank part into dx, dA and dB; the base product too, into dx, if there is a weight.
void run_kernels(const LowRankBackward& problem, const Tensor& weight, KernelFamily family) {
  const KernelOptions options(problem.scaling, problem.dropout);
  CudaScratch scratch(problem.dy.options());
  const auto& [dy, lora_A, lora_B] = std::tie(problem.dy, problem.lora_A, problem.lora_B);
  with_types(dy.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1);
    const BackwardCall<T, TA> call{.dy = matrix<T>(dy),
                                   .x = matrix<T>(problem.x, M, K),
                                   .weight = weight_of<T>(weight, N, K),
                                   .h = data_or_null<float>(problem.h),
                                   .lora_A = data_or_null<TA>(lora_A),
                                   .lora_B = data_or_null<TA>(lora_B),
                                   .r = static_cast<int>(lora_A.size(0)),
                                   .scaling = options.scaling,
                                   .scaling_factor = options.scaling_factor,
                                   .dropout = options.dropout,
                                   .dx = out_or_null<T>(problem.dx),
                                   .dA = out_or_null<TA>(problem.dA),
                                   .dB = out_or_null<TA>(problem.dB)};
    run_backward(call, scratch.allocator(), at::cuda::getCurrentCUDAStream(), family);
  });
}

// `rows` is x [M, K] or dy [M, N]; `x` that of a backward pass which reads it, or undefined.
CudaPath path_for(bool backward, const Tensor& rows, const Tensor& x, const OptionalTensor& weight,
                  const Tensor& lora_A, const Tensor& lora_B, const LoraDropout& dropout) {
  CudaCall call = make_cuda_call(backward, rows.get_device(), rows.size(0), lora_B.size(0),
                                 lora_A.size(1), lora_A.size(0), rows.scalar_type(),
                                 lora_A.scalar_type(), dropout.enabled(), weight);
  for (const Tensor& matrix : {rows, x}) {
    if (matrix.defined()) call.rows = std::min(call.rows, rows_of(matrix));
  }
  return trusted_path(call);
}

// Of a call that reads x or dy [M, ...].
void print_cuda_path(const char* pass, const Tensor& rows, const Tensor& lora_A,
                     const Tensor& lora_B, const LoraDropout& dropout, const CudaPath& path) {
  print_path({pass, rows.size(0), lora_B.size(0), lora_A.size(1), lora_A.size(0),
              rows.scalar_type(), lora_A.scalar_type(), dropout.enabled()},
             cuda_path_name(path), path.reason);
}

std::tuple<Tensor, Tensor> lora_linear_fwd_cuda(const LoraLinearCall& call, bool return_h) {
  using Kernels = CudaPath::Kernels;
  check_lora_linear(call);
  const c10::cuda::CUDAGuard guard(call.x.device());
  const auto [y, h, low_rank] = lora_linear_prepare_fwd(call, return_h);
  if (y.numel() == 0) return {y, h.zero_()};
  const BaseProduct base(call.weight);
  const CudaPath path = path_for(false, low_rank.x, Tensor(), call.weight, low_rank.lora_A,
                                 low_rank.lora_B, call.dropout);
  if (prints_paths()) {
    print_cuda_path("forward", low_rank.x, call.lora_A, call.lora_B, call.dropout, path);
  }
  const bool fused = path.kernels == Kernels::Fused;
  if (path.kernels == Kernels::Composed) {
    low_rank_forward_blas(low_rank);
  } else {
    run_kernels(low_rank, fused ? readable(call.weight) : Tensor(), path.family);
  }
  if (!fused) base.add(low_rank.y, low_rank.x);
  return {y, h};
}

Gradients lora_linear_bwd_cuda(const LoraLinearBackwardCall& call, GradientMask mask) {
  using Kernels = CudaPath::Kernels;
  check_lora_linear_bwd(call, mask);
  const c10::cuda::CUDAGuard guard(call.dy.device());
  const auto [gradients, low_rank, done] = lora_linear_prepare_bwd(call, mask);
  if (done) return gradients;
  const CudaPath path = path_for(true, low_rank.dy, low_rank.x, call.weight, low_rank.lora_A,
                                 low_rank.lora_B, call.dropout);
  if (prints_paths()) {
    print_cuda_path("backward", low_rank.dy, call.lora_A, call.lora_B, call.dropout, path);
  }
  const bool fused = path.kernels == Kernels::Fused;
  if (path.kernels == Kernels::Composed) {
    low_rank_backward_blas(low_rank);
  } else {
    run_kernels(low_rank, fused && mask[kGradX] ? readable(*call.weight) : Tensor(), path.family);
  }
  if (!fused && mask[kGradX]) {
    BaseProduct(*call.weight).add_gradient(low_rank.dx, low_rank.dy);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear_fwd", flat<&lora_linear_fwd_cuda>);
  m.impl("lora_linear_bwd", flat<&lora_linear_bwd_cuda>);
}

}  // namespace lora_ext
