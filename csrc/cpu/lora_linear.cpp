// lora_linear on the CPU. The low-rank part is written into y and dx; then ATen's BLAS adds the
// base product with beta = 1, in fp32 accumulators, so that results are rounded to their dtype
// once.
#include "ops/lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <utility>

#include "cpu/backend.h"
#include "cpu/dropout.h"
#include "cpu/lora_linear.h"
#include "ops/base_product.h"
#include "ops/lora_linear_blas.h"
#include "ops/operator.h"
#include "ops/print_path.h"

namespace lora_ext {
namespace {

// BLAS adds the product of a single row to what is there term by term, in memory. A low-rank part
// or a bias that is much larger than the base would round every term to its own size, so that the
// product is made before them: in forward in y, which is then the bias of the low-rank part, in
// backward apart.
bool makes_base_apart(const Tensor& out) {
  return out.size(0) == 1 && at::toOpMathType(out.scalar_type()) == out.scalar_type();
}

void add_row(const Tensor& out, const Tensor& row) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "add_row", [&] {
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    const scalar_t* terms = row.const_data_ptr<scalar_t>();
    for (int64_t i = 0, size = out.numel(); i < size; ++i) sums[i] += terms[i];
  });
}

// Of a call that reads x or dy [M, ...].
void print_path_of(bool forward, const Tensor& rows, const Tensor& lora_A, const Tensor& lora_B,
                   const LoraDropout& dropout, const BaseProduct* product) {
  const int64_t M = rows.size(0), N = lora_B.size(0);
  const auto base = rows.scalar_type();
  const auto [path, reason] =
      explain_lora_linear_cpu(M, N, lora_A, base, dropout.enabled() ? dropout.p : 0.0,
                              product ? product->path(M, forward) : std::nullopt);
  print_path({forward ? "forward" : "backward", M, N, lora_A.size(1), lora_A.size(0), base,
              lora_A.scalar_type(), dropout.enabled()},
             path, reason);
}

std::tuple<Tensor, Tensor> lora_linear_fwd_cpu(const LoraLinearCall& call, bool return_h) {
  check_lora_linear(call);
  return lora_linear_fwd_checked(call, return_h);
}

Gradients lora_linear_bwd_cpu(const LoraLinearBackwardCall& call, GradientMask mask) {
  check_lora_linear_bwd(call, mask);
  return lora_linear_bwd_checked(call, mask);
}

// Copies are little more than the caches have of a block, which all threads share.
LowRankProducts products_of(const CpuPath& path, at::ScalarType base) {
  LowRankProducts products;
  if (path.widens) products.dtype = at::toOpMathType(base);
  products.block_elements = at::get_num_threads() * (int64_t{1} << 20);
  products.keep_rows = &keep_rows_cpu;
  return products;
}

}  // namespace

void print_cpu_path(const LowRankForward& problem, const BaseProduct* base) {
  print_path_of(true, problem.x, problem.lora_A, problem.lora_B, problem.dropout, base);
}

void print_cpu_path(const LowRankBackward& problem, const BaseProduct* base) {
  print_path_of(false, problem.dy, problem.lora_A, problem.lora_B, problem.dropout, base);
}

std::tuple<Tensor, Tensor> lora_linear_fwd_prepared(PreparedForward prepared,
                                                    const BaseProduct& base) {
  auto& [y, h, low_rank] = prepared;
  if (y.numel() == 0) return {y, h.zero_()};
  if (prints_paths()) print_cpu_path(low_rank, &base);
  if (makes_base_apart(low_rank.y)) {
    const Tensor biases = std::exchange(low_rank.bias, low_rank.y);
    base.write(low_rank.y, low_rank.x);
    if (biases.defined()) add_row(low_rank.y, biases);
    low_rank_forward(low_rank);
  } else {
    low_rank_forward(low_rank);
    base.add(low_rank.y, low_rank.x);
  }
  return {y, h};
}

Gradients lora_linear_bwd_prepared(const PreparedBackward& prepared, const BaseProduct* base) {
  const auto& [gradients, low_rank, done] = prepared;
  if (done) return gradients;
  if (prints_paths()) print_cpu_path(low_rank, base);
  low_rank_backward(low_rank);
  if (!low_rank.dx.defined()) return gradients;
  if (makes_base_apart(low_rank.dx)) {
    add_row(low_rank.dx, base->gradient(low_rank.dy));
  } else {
    base->add_gradient(low_rank.dx, low_rank.dy);
  }
  return gradients;
}

std::tuple<Tensor, Tensor> lora_linear_fwd_checked(const LoraLinearCall& call, bool return_h) {
  return lora_linear_fwd_prepared(lora_linear_prepare_fwd(with_scaling_read(call), return_h),
                                  DenseProduct(call.weight));
}

void lora_linear_fwd_into(const LoraLinearCall& call, const Tensor& y, const Tensor& h) {
  lora_linear_fwd_prepared(lora_linear_prepare_fwd(with_scaling_read(call), h.defined(), y, h),
                           DenseProduct(call.weight));
}

Gradients lora_linear_bwd_checked(const LoraLinearBackwardCall& call, GradientMask mask) {
  return lora_linear_bwd_into(call, mask, {});
}

Gradients lora_linear_bwd_into(const LoraLinearBackwardCall& call, const GradientMask& mask,
                               const Tensor& dx) {
  const PreparedBackward prepared = lora_linear_prepare_bwd(with_scaling_read(call), mask, dx);
  if (!mask[kGradX]) return lora_linear_bwd_prepared(prepared, nullptr);
  const DenseProduct base(*call.weight);
  return lora_linear_bwd_prepared(prepared, &base);
}

CpuPath path_for(int64_t M, int64_t N, const Tensor& lora_A, at::ScalarType base, bool dropout,
                 bool grouped) {
  return path_for(M, N, lora_A.size(1), lora_A.size(0), lora_A.scalar_type(), base, dropout,
                  grouped);
}

CpuPath path_for(int64_t M, int64_t N, int64_t K, int64_t r, at::ScalarType adapter,
                 at::ScalarType base, bool dropout, bool grouped) {
  CpuProblem problem{};
  problem.M = M, problem.N = N, problem.K = K, problem.r = r;
  problem.dropout = dropout;
  problem.mixed = adapter != base;
  problem.bf16 = base == at::kBFloat16 && !problem.mixed;
  problem.bf16_dot = bf16_dot_kernels() != nullptr;
  problem.fast_blas = has_fast_blas(base, M);
  problem.half = at::isReducedFloatingType(base);
  problem.faster_bf16 = cpu_multiplies_faster(at::kBFloat16);
  problem.grouped = grouped;
  problem.compute_bytes = c10::elementSize(at::toOpMathType(base));
  problem.threads = at::get_num_threads();
  return choose_cpu_path(problem);
}

void low_rank_forward(const LowRankForward& problem) {
  const CpuPath path = path_for(problem.y.size(0), problem.y.size(1), problem.lora_A,
                                problem.x.scalar_type(), problem.dropout.enabled());
  if (path.kernels == CpuPath::Kernels::Blas) {
    low_rank_forward_blas(problem, products_of(path, problem.x.scalar_type()));
  } else {
    low_rank_forward_fused(problem, path);
  }
}

void low_rank_backward(const LowRankBackward& problem) {
  const CpuPath path = path_for(problem.dy.size(0), problem.dy.size(1), problem.lora_A,
                                problem.dy.scalar_type(), problem.dropout.enabled());
  if (path.kernels == CpuPath::Kernels::Blas) {
    low_rank_backward_blas(problem, products_of(path, problem.dy.scalar_type()));
  } else {
    low_rank_backward_fused(problem, path);
  }
}

std::pair<std::string, std::string> explain_lora_linear_cpu(
    int64_t tokens, int64_t out_features, const Tensor& lora_A, at::ScalarType base,
    double dropout_p, const std::optional<BasePath>& product) {
  const CpuPath path = path_for(tokens, out_features, lora_A, base, dropout_p > 0.0);
  BasePath added;
  if (product.has_value()) {
    added = *product;
  } else if (widens_product(tokens, out_features, lora_A.size(1), base)) {
    added.reason = "; the base product is float32's, of operands widened block by block";
  }
  const std::string reason = path.reason + added.reason;
  if (path.kernels == CpuPath::Kernels::Blas) return {"cpu blas" + added.path, reason};
  const CpuCapability capability = path.kernels == CpuPath::Kernels::Bf16Dot
                                       ? cpu_capability()
                                       : std::min(cpu_capability(), CpuCapability::Avx512);
  return {std::string("cpu fused ") + cpu_capability_name(capability) + added.path, reason};
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_fwd", flat<&lora_linear_fwd_cpu>);
  m.impl("lora_linear_bwd", flat<&lora_linear_bwd_cpu>);
}

}  // namespace lora_ext
