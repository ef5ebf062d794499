// The low-rank part of lora_linear by vector kernels: arguments, scratch, and parts of the rows.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "cpu/backend.h"
#include "cpu/lora_linear.h"

namespace lora_ext {

const LoraLinearKernels& kernels_of(const CpuPath& path, const Tensor& base,
                                    const Tensor& adapter) {
  return path.kernels == CpuPath::Kernels::Bf16Dot
             ? *bf16_dot_kernels()
             : cpu_kernels(base.scalar_type(), adapter.scalar_type()).lora_linear;
}

void low_rank_forward_fused(const LowRankForward& problem, const CpuPath& path) {
  const Tensor &x = problem.x, &lora_A = problem.lora_A, &lora_B = problem.lora_B;
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0), r = lora_A.size(0);
  const auto& kernels = kernels_of(path, x, lora_A);
  const Tensor A_t = packed(kernels, lora_A), B_t = packed(kernels, lora_B);
  LoraLinearForwardArgs args{};
  args.M = M, args.K = K, args.N = N, args.r = r;
  args.x = x.const_data_ptr(), args.ldx = x.stride(0);
  args.lora_A_t = A_t.const_data_ptr(), args.lora_B_t = B_t.const_data_ptr();
  args.bias = data_or_null(problem.bias);
  args.scaling = problem.scaling.number;
  args.dropout = dropout_args(problem.dropout.p, problem.dropout.rng_state);
  args.y = problem.y.data_ptr(), args.h = out_or_null(problem.h);

  const Scratch scratch(kernels.scratch_bytes(K, r), path.fwd_parts);
  parallel_parts(M, path.fwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.forward_rows(args, begin, end, scratch.part(part));
  });
}

void low_rank_backward_fused(const LowRankBackward& problem, const CpuPath& path) {
  const Tensor &dy = problem.dy, &x = problem.x, &lora_A = problem.lora_A, &lora_B = problem.lora_B;
  const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1), r = lora_A.size(0);
  const auto compute = at::toOpMathType(dy.scalar_type());
  const auto& kernels = kernels_of(path, dy, lora_A);
  const bool makes_h = problem.dB.defined() && !problem.h.defined();
  const Tensor A_t = makes_h ? packed(kernels, lora_A) : Tensor();
  LoraLinearBackwardArgs args{};
  args.M = M, args.K = K, args.N = N, args.r = r;
  args.dy = dy.const_data_ptr(), args.lddy = dy.stride(0);
  args.x = data_or_null(x), args.ldx = x.defined() ? x.stride(0) : 0;
  args.h = data_or_null(problem.h);
  args.lora_A = lora_A.const_data_ptr(), args.lora_A_t = data_or_null(A_t);
  args.lora_B = lora_B.const_data_ptr();
  args.scaling = problem.scaling.number;
  args.dropout = dropout_args(problem.dropout.p, problem.dropout.rng_state);
  args.dx = out_or_null(problem.dx);

  const PartialSums dA(problem.dA, path.bwd_parts, compute, /*transposed=*/false);
  const PartialSums dB(problem.dB, path.bwd_parts, compute, /*transposed=*/true);
  const Scratch scratch(kernels.scratch_bytes(K, r), path.bwd_parts);
  parallel_parts(M, path.bwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.backward_rows(args, begin, end, dA.part(part), dB.part(part), scratch.part(part));
  });
  dA.reduce(kernels.reduce_a, 1.0);
  dB.reduce(kernels.reduce_b, problem.scaling.number);
}

}  // namespace lora_ext
