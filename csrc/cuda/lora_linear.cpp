// lora_linear on CUDA, by the kernels of csrc/kernels or composed of ATen's products;
// lora_linear_path.h chooses.
#include "cuda/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/lora_linear_calls.h"
#include "cuda/trust.h"
#include "ops/base_product.h"
#include "ops/lora_linear_blas.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

// By the kernels of this family; `weight` as forward_call takes it.
void run_kernels(LowRankForward problem, const Tensor& weight, KernelFamily family) {
  const KernelOptions options(problem.scaling, problem.dropout);
  CudaScratch scratch(problem.x.options());
  problem.bias = in_pairs(problem.bias);
  with_types(problem.x.scalar_type(), problem.lora_A.scalar_type(), [&](auto base, auto adapter) {
    run_forward(forward_call<decltype(base), decltype(adapter)>(problem, weight, options),
                scratch.allocator(), at::cuda::getCurrentCUDAStream(), family);
  });
}

void run_kernels(const LowRankBackward& problem, const Tensor& weight, KernelFamily family) {
  const KernelOptions options(problem.scaling, problem.dropout);
  CudaScratch scratch(problem.dy.options());
  with_types(problem.dy.scalar_type(), problem.lora_A.scalar_type(), [&](auto base, auto adapter) {
    run_backward(backward_call<decltype(base), decltype(adapter)>(problem, weight, options),
                 scratch.allocator(), at::cuda::getCurrentCUDAStream(), family);
  });
}

std::tuple<Tensor, Tensor> lora_linear_fwd_cuda(const LoraLinearCall& call, bool return_h) {
  using Kernels = CudaPath::Kernels;
  check_lora_linear(call);
  const c10::cuda::CUDAGuard guard(call.x.device());
  const auto [y, h, low_rank] = lora_linear_prepare_fwd(call, return_h);
  if (y.numel() == 0) return {y, h.zero_()};
  const DenseProduct base(call.weight);
  const CudaPath path = trusted_path(cuda_call_of(false, low_rank.x, Tensor(), call.weight,
                                                  low_rank.lora_A, low_rank.lora_B, call.dropout));
  if (prints_paths()) {
    print_cuda_path("forward", low_rank.x, call.lora_A, call.lora_B, call.dropout, path,
                    path.reason);
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
  const CudaPath path = trusted_path(cuda_call_of(true, low_rank.dy, low_rank.x, call.weight,
                                                  low_rank.lora_A, low_rank.lora_B, call.dropout));
  if (prints_paths()) {
    print_cuda_path("backward", low_rank.dy, call.lora_A, call.lora_B, call.dropout, path,
                    path.reason);
  }
  const bool fused = path.kernels == Kernels::Fused;
  if (path.kernels == Kernels::Composed) {
    low_rank_backward_blas(low_rank);
  } else {
    run_kernels(low_rank, fused && mask[kGradX] ? readable(*call.weight) : Tensor(), path.family);
  }
  if (!fused && mask[kGradX]) {
    DenseProduct(*call.weight).add_gradient(low_rank.dx, low_rank.dy);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear_fwd", flat<&lora_linear_fwd_cuda>);
  m.impl("lora_linear_bwd", flat<&lora_linear_bwd_cuda>);
}

}  // namespace lora_ext
