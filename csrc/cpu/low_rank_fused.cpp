#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "cpu/backend.h"
#include "cpu/low_rank.h"

namespace lora_ext {
namespace {

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

void* out_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// One block of scratch for each range of rows.
struct Scratch {
  int64_t bytes;
  Tensor blocks;

  Scratch(const LoraLinearKernels& kernels, int64_t K, int64_t r, int64_t parts)
      : bytes(kernels.scratch_bytes(K, r)), blocks(at::empty({parts, bytes}, at::kByte)) {}
  void* part(int64_t index) const { return blocks.data_ptr<uint8_t>() + index * bytes; }
};

// Sums over each range of rows of one adapter gradient, added up in a fixed order.
struct PartialSums {
  Tensor parts;   // [parts, rows, columns] compute type; undefined if the gradient is not wanted
  Tensor result;  // [rows, columns] adapter type; or undefined

  PartialSums(const Tensor& gradient, int64_t count, at::ScalarType compute) : result(gradient) {
    if (!result.defined()) return;
    const bool in_place = count == 1 && compute == result.scalar_type();
    parts = in_place ? result.unsqueeze(0)
                     : at::empty({count, result.size(0), result.size(1)},
                                 result.options().dtype(compute));
  }

  void* part(int64_t index) const {
    if (!parts.defined()) return nullptr;
    return static_cast<char*>(parts.data_ptr()) + index * parts.stride(0) * parts.element_size();
  }

  void reduce(const LoraLinearKernels& kernels, double scale) const {
    if (!result.defined()) return;
    at::parallel_for(0, result.numel(), 8192, [&](int64_t begin, int64_t end) {
      kernels.reduce(parts.const_data_ptr(), parts.size(0), parts.stride(0), scale, begin, end,
                     result.data_ptr());
    });
  }
};

}  // namespace

void low_rank_forward_fused(const LowRankForward& problem, const CpuPath& path) {
  const Tensor &x = problem.x, &lora_A = problem.lora_A, &lora_B = problem.lora_B;
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0), r = lora_A.size(0);
  const auto& kernels = kernels_for(x.scalar_type(), lora_A.scalar_type());
  const Tensor B_t = path.transpose_B
                         ? transposed_b(kernels, lora_B, at::toOpMathType(x.scalar_type()))
                         : Tensor();
  ForwardArgs args{};
  args.K = K, args.N = N, args.r = r;
  args.x = x.const_data_ptr(), args.ldx = x.stride(0);
  args.lora_A = lora_A.const_data_ptr();
  args.lora_B = lora_B.const_data_ptr(), args.lora_B_t = data_or_null(B_t);
  args.bias = data_or_null(problem.bias);
  args.scaling = problem.scaling, args.dropout = problem.dropout;
  args.y = problem.y.data_ptr(), args.h = out_or_null(problem.h);

  const Scratch scratch(kernels, K, r, path.fwd_parts);
  parallel_parts(M, path.fwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.forward_rows(args, begin, end, scratch.part(part));
  });
}

void low_rank_backward_fused(const LowRankBackward& problem, const CpuPath& path) {
  const Tensor &dy = problem.dy, &x = problem.x, &lora_A = problem.lora_A, &lora_B = problem.lora_B;
  const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1), r = lora_A.size(0);
  const auto compute = at::toOpMathType(dy.scalar_type());
  const auto& kernels = kernels_for(dy.scalar_type(), lora_A.scalar_type());
  BackwardArgs args{};
  args.K = K, args.N = N, args.r = r;
  args.dy = dy.const_data_ptr(), args.lddy = dy.stride(0);
  args.x = data_or_null(x), args.ldx = x.defined() ? x.stride(0) : 0;
  args.h = data_or_null(problem.h);
  args.lora_A = lora_A.const_data_ptr(), args.lora_B = lora_B.const_data_ptr();
  args.scaling = problem.scaling, args.dropout = problem.dropout;
  args.dx = out_or_null(problem.dx);

  const PartialSums dA(problem.dA, path.bwd_parts, compute);
  const PartialSums dB(problem.dB, path.bwd_parts, compute);
  const Scratch scratch(kernels, K, r, path.bwd_parts);
  parallel_parts(M, path.bwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.backward_rows(args, begin, end, dA.part(part), dB.part(part), scratch.part(part));
  });
  dA.reduce(kernels, 1.0);
  dB.reduce(kernels, problem.scaling);
}

}  // namespace lora_ext
