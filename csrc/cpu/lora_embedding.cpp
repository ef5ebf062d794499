// lora_embedding on the CPU: one pass over y, and one over dy.
#include "ops/lora_embedding.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/backend.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

// A smaller range of tokens does not pay for waking a thread; in backward it must also pay for a
// sum of its own, as large as lora_B.
constexpr int64_t kMinTokensPerFwdPart = 4;
constexpr int64_t kMinTokensPerBwdPart = 32;

int64_t parts_of(int64_t tokens, int64_t min_tokens) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tokens / min_tokens));
}

// The indices as int64 [M], each a row of the table.
Tensor tokens_of(const char* op, const Tensor& indices, int64_t V) {
  const Tensor tokens = indices.to(at::kLong).reshape({indices.numel()}).contiguous();
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < tokens.numel(); ++m) {
    TORCH_CHECK_INDEX(token[m] >= 0 && token[m] < V, op, ": indices: index out of range: got ",
                      token[m], ", expected 0 to ", V - 1, ", the rows of the weight");
  }
  return tokens;
}

Tensor lora_embedding_fwd_cpu(const LoraEmbeddingCall& call) {
  check_lora_embedding(call);
  const auto& [indices, weight, lora_A, lora_B, scaling] = call;
  const int64_t V = weight.size(0), D = weight.size(1), r = lora_A.size(0);
  const Tensor tokens = tokens_of("lora_embedding", indices, V);
  auto sizes = indices.sizes().vec();
  sizes.push_back(D);
  Tensor y = at::empty(sizes, weight.options());
  if (y.numel() == 0) return y;

  const CpuKernels& table = cpu_kernels(weight.scalar_type(), lora_A.scalar_type());
  const Tensor rows = as_rows(weight), A = lora_A.contiguous();
  const Tensor B_t = packed(table.lora_linear, lora_B.contiguous());
  const LoraEmbeddingForwardArgs args{V,
                                      D,
                                      r,
                                      tokens.const_data_ptr<int64_t>(),
                                      rows.const_data_ptr(),
                                      rows.stride(0),
                                      A.const_data_ptr(),
                                      B_t.const_data_ptr(),
                                      scaling,
                                      y.data_ptr()};
  const auto& kernels = table.lora_embedding;
  const int64_t parts = parts_of(tokens.numel(), kMinTokensPerFwdPart);
  const Scratch scratch(kernels.scratch_bytes(r), parts);
  parallel_parts(tokens.numel(), parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.forward_rows(args, begin, end, scratch.part(part));
  });
  return y;
}

// dA [r, V]: each row sums up its own column of dh [M, r] in the order of the tokens, so that the
// result does not depend on the number of threads.
template <class S>
void scatter_columns(const Tensor& dh, const Tensor& tokens, int64_t padding_idx, Tensor& dA) {
  const int64_t M = dh.size(0), r = dh.size(1), V = dA.size(1);
  const S* values = dh.const_data_ptr<S>();
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  S* sums = dA.data_ptr<S>();
  at::parallel_for(0, r, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      S* row = sums + k * V;
      std::fill_n(row, V, S{0});
      for (int64_t m = 0; m < M; ++m) {
        if (token[m] != padding_idx) row[token[m]] += values[m * r + k];
      }
    }
  });
}

AdapterGradients lora_embedding_bwd_cpu(const LoraEmbeddingBackwardCall& call, AdapterMask mask) {
  check_lora_embedding_bwd(call);
  const auto& [dy, indices, lora_A, lora_B, scaling, lookup] = call;
  const int64_t M = indices.numel(), V = lora_A.size(1), D = lora_B.size(0), r = lora_A.size(0);
  Tensor dA = gradient_or_empty(mask[0], lora_A), dB = gradient_or_empty(mask[1], lora_B);
  if (dy.numel() == 0) return {dA.zero_(), dB.zero_()};

  const Tensor tokens = tokens_of("lora_embedding_bwd", indices, V);
  const auto compute = at::toOpMathType(lora_A.scalar_type());
  const CpuKernels& table = cpu_kernels(dy.scalar_type(), lora_A.scalar_type());
  const Tensor rows = as_rows(dy), A = lora_A.contiguous(), B = lora_B.contiguous();
  Tensor dh = mask[0] ? at::empty({M, r}, lora_A.options().dtype(compute)) : Tensor();
  const LoraEmbeddingBackwardArgs args{V,
                                       D,
                                       r,
                                       tokens.const_data_ptr<int64_t>(),
                                       rows.const_data_ptr(),
                                       rows.stride(0),
                                       A.const_data_ptr(),
                                       B.const_data_ptr(),
                                       scaling,
                                       mask[0] ? dh.data_ptr() : nullptr};
  const auto& kernels = table.lora_embedding;
  const int64_t parts = parts_for_sums(M, parts_of(M, kMinTokensPerBwdPart));
  const PartialSums dB_sums(mask[1] ? dB : Tensor(), parts, compute, /*transposed=*/true);
  const Scratch scratch(kernels.scratch_bytes(r), parts);
  parallel_parts(M, parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.backward_rows(args, begin, end, dB_sums.part(part), scratch.part(part));
  });
  dB_sums.reduce(table.lora_linear.reduce_b, scaling);
  if (!mask[0]) return {dA, dB};

  if (lookup.scale_grad_by_freq) {
    dh.div_(at::bincount(tokens, {}, V).index_select(0, tokens).unsqueeze(1));
  }
  Tensor sums = compute == dA.scalar_type() ? dA : at::empty(dA.sizes(), dh.options());
  if (compute == at::kDouble) {
    scatter_columns<double>(dh, tokens, lookup.padding_idx, sums);
  } else {
    scatter_columns<float>(dh, tokens, lookup.padding_idx, sums);
  }
  return {sums.to(dA.scalar_type()), dB};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_embedding_fwd", flat<&lora_embedding_fwd_cpu>);
  m.impl("lora_embedding_bwd", flat<&lora_embedding_bwd_cpu>);
}

}  // namespace lora_ext
