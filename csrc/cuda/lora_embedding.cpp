// lora_embedding on CUDA: one pass over y. Backward is one over dy, by the low-rank pass of
// lora_linear where its kernels run, and ATen's sum over tokens; else a composition of ATen.
#include "ops/lora_embedding.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/lora_linear.h"
#include "cuda/operands.h"
#include "cuda/row_path.h"
#include "cuda/trust.h"
#include "kernels/lora_embedding.h"
#include "ops/operator.h"
#include "ops/print_path.h"

namespace lora_ext {
namespace {

Tensor lora_embedding_fwd_cuda(const LoraEmbeddingCall& call) {
  check_lora_embedding(call);
  const auto& [indices, weight, lora_A, lora_B, scaling] = call;
  const c10::cuda::CUDAGuard guard(weight.device());
  const RowPath path = row_path(weight.scalar_type());
  if (prints_paths()) {
    print_path(
        c10::str("lora_embedding of ", indices.numel(), " tokens, ", weight.size(0), " -> ",
                 weight.size(1), ", r ", lora_A.size(0), ", ", dtype_name(weight.scalar_type()),
                 " with ", dtype_name(lora_A.scalar_type()), " adapters"),
        path.name, path.reason);
  }
  if (!path.kernels) return lora_embedding_fwd_composed(call);
  auto sizes = indices.sizes().vec();
  sizes.push_back(weight.size(1));
  Tensor y = at::empty(sizes, weight.options());
  if (y.numel() == 0) return y;
  const Tensor tokens = indices.to(at::kLong).contiguous(), rows = as_rows(weight);
  const Tensor A = lora_A.contiguous(), B = lora_B.contiguous();
  with_all_types(weight.scalar_type(), lora_A.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    const EmbeddingCall<T, TA> of_kernel{.tokens = tokens.const_data_ptr<int64_t>(),
                                         .M = tokens.numel(),
                                         .weight = matrix<T>(rows),
                                         .lora_A = data_or_null<TA>(A),
                                         .lora_B = data_or_null<TA>(B),
                                         .rank = static_cast<int>(A.size(0)),
                                         .scaling = static_cast<float>(call.scaling),
                                         .y = out_or_null<T>(y)};
    run_lora_embedding(of_kernel, at::cuda::getCurrentCUDAStream());
  });
  return y;
}

// That of lora_linear's low-rank passes over dy [M, D].
CudaPath path_over(const Tensor& dy, const Tensor& lora_A) {
  const int64_t D = dy.size(1);
  CudaCall call = make_cuda_call(/*backward=*/true, dy.get_device(), dy.size(0), D, lora_A.size(1),
                                 lora_A.size(0), dy.scalar_type(), lora_A.scalar_type(),
                                 /*dropout=*/false, std::nullopt);
  call.rows = std::min(rows_of_sizes(D, D), rows_of(dy));
  return trusted_path(call);
}

AdapterGradients lora_embedding_bwd_cuda(const LoraEmbeddingBackwardCall& call, AdapterMask mask) {
  check_lora_embedding_bwd(call);
  const Tensor &lora_A = call.lora_A, &lora_B = call.lora_B;
  const c10::cuda::CUDAGuard guard(call.dy.device());
  if (call.dy.numel() == 0 || lora_A.numel() == 0) {
    return {gradient_or_empty(mask[0], lora_A).zero_(), gradient_or_empty(mask[1], lora_B).zero_()};
  }
  const Tensor rows = as_rows(call.dy);
  const CudaPath path = path_over(rows, lora_A);
  const bool kernels = path.kernels != CudaPath::Kernels::Composed;
  if (prints_paths()) {
    const char* name = path.family == KernelFamily::Sm90 ? "cuda fused sm_90a" : "cuda fused sm_80";
    print_path(c10::str("lora_embedding_bwd of ", rows.size(0), " tokens, ", lora_A.size(1), " -> ",
                        rows.size(1), ", r ", lora_A.size(0), ", ", dtype_name(rows.scalar_type()),
                        " with ", dtype_name(lora_A.scalar_type()), " adapters"),
               kernels ? name : "cuda aten",
               kernels ? "one pass over dy, sums over tokens by ATen" : path.reason);
  }
  if (!kernels) return lora_embedding_bwd_composed(call, mask);

  Tensor dA = gradient_or_empty(mask[0], lora_A), dB = gradient_or_empty(mask[1], lora_B);
  if (!mask[0] && !mask[1]) return {dA, dB};
  const auto& [padding_idx, scale_grad_by_freq] = call.lookup;
  const auto in_float = rows.options().dtype(at::kFloat);
  const Tensor B = lora_B.contiguous(), tokens = call.indices.reshape({rows.size(0)});
  const Tensor h =
      mask[1] ? at::embedding(lora_A.t(), tokens).to(at::kFloat).contiguous() : Tensor();
  const Tensor dh = mask[0] ? at::empty({rows.size(0), lora_A.size(0)}, in_float) : Tensor();
  CudaScratch scratch(rows.options());
  with_all_types(rows.scalar_type(), B.scalar_type(), [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    if constexpr (!std::is_same_v<T, float>) {  // tensor cores' types alone come here
      const UpGradCall<T, TA> of_kernels{.dy = matrix<T>(rows),
                                         .h = data_or_null<float>(h),
                                         .lora_B = data_or_null<TA>(B),
                                         .r = static_cast<int>(B.size(1)),
                                         .scaling = static_cast<float>(call.scaling),
                                         .dh = out_or_null<float>(dh),
                                         .dB = mask[1] ? out_or_null<TA>(dB) : nullptr};
      run_up_grad(of_kernels, scratch.allocator(), at::cuda::getCurrentCUDAStream(), path.family);
    }
  });
  if (mask[0]) {
    dA.copy_(
        at::embedding_dense_backward(dh, tokens, lora_A.size(1), padding_idx, scale_grad_by_freq)
            .t());
  }
  return {dA, dB};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_embedding_fwd", flat<&lora_embedding_fwd_cuda>);
  m.impl("lora_embedding_bwd", flat<&lora_embedding_bwd_cuda>);
}

}  // namespace lora_ext
