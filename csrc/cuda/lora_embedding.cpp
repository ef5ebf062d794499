// lora_embedding on CUDA: one pass over y. Backward is a composition of ATen, whose sums over
// tokens are in a fixed order.
#include "ops/lora_embedding.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/operands.h"
#include "cuda/row_path.h"
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
    print_path(c10::str("lora_embedding of ", indices.numel(), " tokens, ", weight.size(0), " -> ",
                        weight.size(1), ", r ", lora_A.size(0), ", ", weight.scalar_type(),
                        " with ", lora_A.scalar_type(), " adapters"),
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
                                         .rank = A.size(0),
                                         .scaling = static_cast<float>(call.scaling),
                                         .y = out_or_null<T>(y)};
    run_lora_embedding(of_kernel, at::cuda::getCurrentCUDAStream());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_embedding_fwd", flat<&lora_embedding_fwd_cuda>);
}

}  // namespace lora_ext
