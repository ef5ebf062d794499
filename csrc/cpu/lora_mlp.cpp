// lora_mlp on the CPU: f(e) * g in one pass, between the operators of lora_linear_multi.
#include "ops/lora_mlp.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/backend.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

// f(first, rows) for ranges of the rows of a tensor [M, N], at most so many elements at a time.
template <class F>
void for_rows(const Tensor& like, int64_t elements, const F& f) {
  const int64_t M = like.size(0), N = like.size(1);
  if (M == 0 || N == 0) return;
  const int64_t rows = std::max<int64_t>(1, elements / N);
  at::parallel_for(0, at::divup(M, rows), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // of this thread
    for (int64_t i = begin; i < end; ++i) f(i * rows, std::min(rows, M - i * rows));
  });
}

// What ATen writes in between stays in the L2 cache.
constexpr int64_t kElementsInCache = 32768;
// Fewer do not pay for waking a thread.
constexpr int64_t kElementsOfThread = 16384;

bool has_kernel(const Tensor& e, Activation f) {
  return e.scalar_type() != at::kDouble && (f == Activation::kSilu || f == Activation::kGeluTanh);
}

void gated_out_cpu(const Tensor& out, const Tensor& e, const Tensor& g, Activation f) {
  if (!has_kernel(e, f)) {
    return for_rows(e, kElementsInCache, [&](int64_t first, int64_t rows) {
      const auto part = [&](const Tensor& all) { return all.narrow(0, first, rows); };
      gated_out(part(out), part(e), part(g), f);
    });
  }
  const GatedArgs args{e.size(1),          f == Activation::kGeluTanh,
                       e.const_data_ptr(), g.const_data_ptr(),
                       e.stride(0),        g.stride(0),
                       out.data_ptr(),     out.stride(0)};
  const GatedKernels& kernels = cpu_kernels(e.scalar_type()).gated;
  for_rows(e, kElementsOfThread,
           [&](int64_t first, int64_t rows) { kernels.forward_rows(args, first, first + rows); });
}

void gated_backward_out_cpu(const Tensor& de, const Tensor& dg, const Tensor& da, const Tensor& e,
                            const Tensor& g, Activation f) {
  if (!has_kernel(e, f)) {
    return for_rows(e, kElementsInCache, [&](int64_t first, int64_t rows) {
      const auto part = [&](const Tensor& all) { return all.narrow(0, first, rows); };
      gated_backward_out(part(de), part(dg), part(da), part(e), part(g), f);
    });
  }
  const GatedBackwardArgs args{e.size(1),           f == Activation::kGeluTanh,
                               da.const_data_ptr(), e.const_data_ptr(),
                               g.const_data_ptr(),  da.stride(0),
                               e.stride(0),         g.stride(0),
                               de.data_ptr(),       dg.data_ptr(),
                               de.stride(0),        dg.stride(0)};
  const GatedKernels& kernels = cpu_kernels(e.scalar_type()).gated;
  for_rows(e, kElementsOfThread,
           [&](int64_t first, int64_t rows) { kernels.backward_rows(args, first, first + rows); });
}

constexpr GatedOps kGatedCpu{&gated_out_cpu, &gated_backward_out_cpu};

std::tuple<Tensor, TensorVector, TensorVector> lora_mlp_fwd_cpu(const LoraMlpCall& call,
                                                                at::IntArrayRef return_h) {
  return lora_mlp_fwd_by(call, return_h, kGatedCpu);
}

MultiGradients lora_mlp_bwd_cpu(const LoraMlpBackwardCall& call, bool wants_x,
                                at::IntArrayRef wanted, OptionalType dx_type) {
  return lora_mlp_bwd_by(call, wants_x, wanted, dx_type, kGatedCpu);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_mlp_fwd", flat<&lora_mlp_fwd_cpu>);
  m.impl("lora_mlp_bwd", flat<&lora_mlp_bwd_cpu>);
}

}  // namespace lora_ext
