#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "cpu/backend.h"
#include "cpu/lora_linear.h"

namespace lora_ext {
namespace {

// The adapter in the order in which the kernels read its transpose.
Tensor packed(const LoraLinearKernels& kernels, const Tensor& adapter) {
  const int64_t rows = adapter.size(0), columns = adapter.size(1);
  Tensor result = at::empty({kernels.packed_bytes(rows, columns)}, at::kByte);
  constexpr int64_t kMinElements = 32768;  // fewer do not pay for waking a thread
  at::parallel_for(0, rows, at::divup(kMinElements, std::max<int64_t>(columns, 1)),
                   [&](int64_t begin, int64_t end) {
                     kernels.pack(adapter.const_data_ptr(), rows, columns, begin, end,
                                  result.data_ptr());
                   });
  return result;
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void* out_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

const LoraLinearKernels& kernels_of(const CpuPath& path, const Tensor& base,
                                    const Tensor& adapter) {
  return path.kernels == CpuPath::Kernels::Bf16Dot
             ? *bf16_dot_kernels()
             : cpu_kernels().lora_linear[dtype_pair(base.scalar_type(), adapter.scalar_type())];
}

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
  Tensor parts;   // [parts, rows * columns] compute type; undefined if the gradient is not wanted
  Tensor result;  // [rows, columns] adapter type; or undefined

  PartialSums(const Tensor& gradient, int64_t count, at::ScalarType compute, bool transposed)
      : result(gradient) {
    if (!result.defined()) return;
    const bool in_place = count == 1 && compute == result.scalar_type() && !transposed;
    parts = in_place ? result.unsqueeze(0)
                     : at::empty({count, result.size(0), result.size(1)},
                                 result.options().dtype(compute));
  }

  void* part(int64_t index) const {
    if (!parts.defined()) return nullptr;
    return static_cast<char*>(parts.data_ptr()) + index * parts.stride(0) * parts.element_size();
  }

  void reduce(decltype(LoraLinearKernels::reduce_a) kernel, double scale) const {
    if (!result.defined()) return;
    const int64_t rows = result.size(0), columns = result.size(1);
    const int64_t min_rows = at::divup(8192, std::max<int64_t>(columns, 1));
    at::parallel_for(0, rows, min_rows, [&](int64_t begin, int64_t end) {
      kernel(parts.const_data_ptr(), parts.size(0), parts.stride(0), scale, rows, columns, begin,
             end, result.data_ptr());
    });
  }
};

}  // namespace

void low_rank_forward_fused(const LowRankForward& problem, const CpuPath& path) {
  const Tensor &x = problem.x, &lora_A = problem.lora_A, &lora_B = problem.lora_B;
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0), r = lora_A.size(0);
  const auto& kernels = kernels_of(path, x, lora_A);
  const Tensor A_t = packed(kernels, lora_A), B_t = packed(kernels, lora_B);
  ForwardArgs args{};
  args.K = K, args.N = N, args.r = r;
  args.x = x.const_data_ptr(), args.ldx = x.stride(0);
  args.lora_A_t = A_t.const_data_ptr(), args.lora_B_t = B_t.const_data_ptr();
  args.bias = data_or_null(problem.bias);
  args.scaling = problem.scale.scaling, args.dropout = dropout_args(problem.scale);
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
  const auto& kernels = kernels_of(path, dy, lora_A);
  const bool makes_h = problem.dB.defined() && !problem.h.defined();
  const Tensor A_t = makes_h ? packed(kernels, lora_A) : Tensor();
  BackwardArgs args{};
  args.K = K, args.N = N, args.r = r;
  args.dy = dy.const_data_ptr(), args.lddy = dy.stride(0);
  args.x = data_or_null(x), args.ldx = x.defined() ? x.stride(0) : 0;
  args.h = data_or_null(problem.h);
  args.lora_A = lora_A.const_data_ptr(), args.lora_A_t = data_or_null(A_t);
  args.lora_B = lora_B.const_data_ptr();
  args.scaling = problem.scale.scaling, args.dropout = dropout_args(problem.scale);
  args.dx = out_or_null(problem.dx);

  const PartialSums dA(problem.dA, path.bwd_parts, compute, /*transposed=*/false);
  const PartialSums dB(problem.dB, path.bwd_parts, compute, /*transposed=*/true);
  const Scratch scratch(kernels, K, r, path.bwd_parts);
  parallel_parts(M, path.bwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.backward_rows(args, begin, end, dA.part(part), dB.part(part), scratch.part(part));
  });
  dA.reduce(kernels.reduce_a, 1.0);
  dB.reduce(kernels.reduce_b, problem.scale.scaling);
}

}  // namespace lora_ext
