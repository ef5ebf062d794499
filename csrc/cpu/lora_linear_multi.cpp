// lora_linear_multi on the CPU. Layers whose way is the same vector kernels make their low-rank
// parts in one pass over x; their base products follow, in place. All others are lora_linear's
// calls.
#include "ops/lora_linear_multi.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/backend.h"
#include "cpu/lora_linear.h"
#include "ops/base_product.h"
#include "ops/lora_linear_prepare.h"
#include "ops/operator.h"
#include "ops/print_path.h"
#include "ops/product.h"

namespace lora_ext {
namespace {

// The layers of a call that run together.
struct Together {
  const LoraLinearKernels* kernels = nullptr;
  CpuPath::Kernels kind{};
  std::vector<size_t> layers;  // with adapter, in order
  int64_t max_N = 0, R = 0;
  bool drops = false;
  at::ScalarType adapter{};

  bool has(size_t layer) const {
    return std::find(layers.begin(), layers.end(), layer) != layers.end();
  }
  CpuPath path(int64_t M, int64_t K, at::ScalarType base) const {
    CpuPath path = path_for(M, max_N, K, R, adapter, base, drops);
    path.kernels = kind;  // each layer's, not that of the sum of ranks
    return path;
  }
};

// Those that have the vector kernels of the first that has any. A single row has no pass to share,
// and its base product has its own order (cpu/lora_linear.cpp).
template <class Layer>
Together choose_together(const std::vector<Layer>& layers, const Tensor& like, int64_t M) {
  Together together;
  int64_t elements = 0;
  if (M < 2) return together;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const int64_t N = layer.lora_B.size(0), r = layer.lora_A.size(0);
    if (!layer.adapted || N == 0 || r == 0 || layer.lora_A.size(1) == 0) continue;
    const bool drops = layer.dropout.enabled();
    const CpuPath path = path_for(M, N, layer.lora_A, like.scalar_type(), drops);
    if (path.kernels == CpuPath::Kernels::Blas) continue;
    const LoraLinearKernels& kernels = kernels_of(path, like, layer.lora_A);
    if (together.kernels != nullptr && together.kernels != &kernels) continue;
    together.kernels = &kernels, together.kind = path.kernels;
    together.adapter = layer.lora_A.scalar_type();
    together.layers.push_back(i);
    together.max_N = std::max(together.max_N, N), together.R += r;
    together.drops = together.drops || drops;
    elements += (N + layer.lora_A.size(1)) * r;
  }
  return pays_together(together.R, elements) ? together : Together{};
}

// All lora_A as one [R, K], packed.
Tensor packed_together(const LoraLinearKernels& kernels, const std::vector<Tensor>& lora_A,
                       int64_t R) {
  const int64_t K = lora_A[0].size(1);
  Tensor result = at::empty({kernels.packed_bytes(R, K)}, at::kByte);
  constexpr int64_t kMinElements = 32768;  // as in packed()
  at::parallel_for(0, R, at::divup(kMinElements, K), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Tensor& A : lora_A) {
      const int64_t from = std::max(begin, first), to = std::min(end, first + A.size(0));
      // Where row 0 of all were, if they were one matrix.
      const auto rows = reinterpret_cast<uintptr_t>(A.const_data_ptr()) -
                        static_cast<uintptr_t>(first * K * A.element_size());
      if (from < to) {
        kernels.pack(reinterpret_cast<const void*>(rows), R, K, from, to, result.data_ptr());
      }
      first += A.size(0);
    }
  });
  return result;
}

void low_rank_forward_together(const std::vector<LowRankForward>& problems,
                               const Together& together) {
  const LoraLinearKernels& kernels = *together.kernels;
  const Tensor& x = problems[0].x;
  const int64_t M = x.size(0), K = x.size(1);
  std::vector<LoraLinearForwardArgs> layers;
  std::vector<Tensor> all_A, kept;  // packed, as long as the kernels run
  for (const LowRankForward& problem : problems) {
    LoraLinearForwardArgs args{};
    args.M = M, args.K = K, args.N = problem.lora_B.size(0), args.r = problem.lora_A.size(0);
    args.x = x.const_data_ptr(), args.ldx = x.stride(0);
    if (together.drops) {
      args.lora_A_t = kept.emplace_back(packed(kernels, problem.lora_A)).const_data_ptr();
    }
    args.lora_B_t = kept.emplace_back(packed(kernels, problem.lora_B)).const_data_ptr();
    args.bias = data_or_null(problem.bias);
    args.scaling = problem.scaling.number;
    args.dropout = dropout_args(problem.dropout.p, problem.dropout.rng_state);
    args.y = problem.y.data_ptr(), args.h = out_or_null(problem.h);
    layers.push_back(args), all_A.push_back(problem.lora_A);
  }
  const Tensor A_t = together.drops ? Tensor() : packed_together(kernels, all_A, together.R);
  const LoraLinearMultiForwardArgs args{layers.data(), static_cast<int64_t>(layers.size()),
                                        together.R, data_or_null(A_t)};
  const CpuPath path = together.path(M, K, x.scalar_type());
  const Scratch scratch(kernels.multi_scratch_bytes(K, together.R, 0), path.fwd_parts);
  parallel_parts(M, path.fwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.multi_forward_rows(args, begin, end, scratch.part(part));
  });
}

// dx of the first problem, which is that of all, is added to.
void low_rank_backward_together(const std::vector<LowRankBackward>& problems,
                                const Together& together) {
  const LoraLinearKernels& kernels = *together.kernels;
  const Tensor &dy = problems[0].dy, &x = problems[0].x, &dx = problems[0].dx;
  const int64_t M = dy.size(0), K = problems[0].lora_A.size(1);
  const auto count = static_cast<int64_t>(problems.size());
  const auto compute = at::toOpMathType(dy.scalar_type());
  const CpuPath path = together.path(M, K, dy.scalar_type());
  const bool by_dots = path.kernels == CpuPath::Kernels::Bf16Dot;
  std::vector<LoraLinearBackwardArgs> layers;
  std::vector<PartialSums> sums_A, sums_B;
  std::vector<Tensor> kept;  // as long as the kernels run
  for (const LowRankBackward& problem : problems) {
    LoraLinearBackwardArgs args{};
    args.M = M, args.K = K, args.N = problem.dy.size(1), args.r = problem.lora_A.size(0);
    args.dy = problem.dy.const_data_ptr(), args.lddy = problem.dy.stride(0);
    args.x = data_or_null(x), args.ldx = x.defined() ? x.stride(0) : 0;
    args.h = data_or_null(problem.h);
    if (dx.defined()) {
      const Tensor wide = by_dots ? problem.lora_A : problem.lora_A.to(compute);
      args.lora_A = kept.emplace_back(wide).const_data_ptr();
    }
    if (problem.dB.defined() && !problem.h.defined()) {
      args.lora_A_t = kept.emplace_back(packed(kernels, problem.lora_A)).const_data_ptr();
    }
    args.lora_B = problem.lora_B.const_data_ptr();
    args.scaling = problem.scaling.number;
    args.dropout = dropout_args(problem.dropout.p, problem.dropout.rng_state);
    layers.push_back(args);
    sums_A.emplace_back(problem.dA, path.bwd_parts, compute, /*transposed=*/false);
    sums_B.emplace_back(problem.dB, path.bwd_parts, compute, /*transposed=*/true);
  }
  const LoraLinearMultiBackwardArgs args{layers.data(), count, together.R, out_or_null(dx)};
  const int64_t masks = together.drops ? count : 0;
  const Scratch scratch(kernels.multi_scratch_bytes(K, together.R, masks), path.bwd_parts);
  parallel_parts(M, path.bwd_parts, [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<void*> dA, dB;
    for (int64_t i = 0; i < count; ++i) {
      dA.push_back(sums_A[i].part(part)), dB.push_back(sums_B[i].part(part));
    }
    kernels.multi_backward_rows(args, begin, end, dA.data(), dB.data(), scratch.part(part));
  });
  for (int64_t i = 0; i < count; ++i) {
    sums_A[i].reduce(kernels.reduce_a, 1.0);
    sums_B[i].reduce(kernels.reduce_b, layers[i].scaling);
  }
}

// [..., columns] of which the rows have adjacent elements: copied once for all layers if it must
// be.
Tensor with_rows(const Tensor& tensor) { return as_rows(tensor).view(tensor.sizes()); }

std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd_cpu(const LoraLinearMultiCall& call,
                                                                 at::IntArrayRef return_h) {
  const std::vector<LayerOfMulti> layers = checked_layers_of(call, return_h);
  const Together together = choose_together(layers, call.x, count_rows(call.x).expect_int());
  const bool fuses = together.layers.size() > 1;
  const Tensor x = fuses ? with_rows(call.x) : call.x;
  TensorVector y, h;
  std::vector<LowRankForward> problems;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [adapted, given, weight, bias, A, B, lora_bias, scaling, dropout] = layers[i];
    if (!fuses || !together.has(i)) {
      auto [own_y, own_h] = layer_fwd(layers[i], return_h[i] != 0, &lora_linear_fwd_checked);
      y.push_back(own_y), h.push_back(own_h);
      continue;
    }
    PreparedForward prepared = lora_linear_prepare_fwd(
        {x, weight, bias, A, B, lora_bias, scaling.read(), dropout}, return_h[i] != 0);
    if (prints_paths()) print_cpu_path(prepared.low_rank);
    y.push_back(prepared.y), h.push_back(prepared.h);
    problems.push_back(std::move(prepared.low_rank));
  }
  if (!fuses) return {y, h};
  low_rank_forward_together(problems, together);
  for (size_t p = 0; p < problems.size(); ++p) {
    DenseProduct(layers[together.layers[p]].weight).add(problems[p].y, problems[p].x);
  }
  return {y, h};
}

MultiGradients lora_linear_multi_bwd_cpu(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                         at::IntArrayRef wanted, OptionalType dx_type) {
  const std::vector<BackwardLayerOfMulti> layers = checked_layers_of(call, wants_x, wanted);
  const Tensor& dy = call.dy[0];
  const Together together = choose_together(layers, dy, count_rows(dy).expect_int());
  if (together.layers.empty() || layers.size() < 2 || sums_in_other_type(dy, wants_x, dx_type)) {
    return separate_gradients(layers, &lora_linear_bwd_checked, dx_type);
  }
  const OptionalTensor x = call.x.has_value() ? OptionalTensor(with_rows(*call.x)) : std::nullopt;
  MultiGradients all = no_gradients(layers.size());
  const int64_t K = layers[together.layers[0]].lora_A.size(1);
  Tensor& dx = std::get<0>(all);
  dx = gradient_or_empty(wants_x, dy, with_width(dy, K));
  const Tensor dx_rows = wants_x ? dx.view({dx.numel() / K, K}) : Tensor();

  std::vector<LowRankBackward> problems;
  std::vector<std::pair<Tensor, Tensor>> products;  // dy and weight of those that are summed in dx
  std::vector<size_t> others;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BackwardLayerOfMulti& layer = layers[i];
    if (layer.adapted && !together.has(i)) {
      others.push_back(i);
      continue;
    }
    GradientMask mask = layer.mask;
    mask[kGradX] = false;
    PreparedBackward prepared =
        lora_linear_prepare_bwd({layer.dy, x, layer.h, layer.weight, layer.lora_A, layer.lora_B,
                                 layer.scaling.read(), layer.dropout},
                                mask);
    put_gradients(all, i, prepared.gradients);
    prepared.low_rank.dx = dx_rows;
    if (wants_x) products.emplace_back(prepared.low_rank.dy, *layer.weight);
    if (!layer.adapted || !(wants_x || mask[kGradA] || mask[kGradB])) continue;
    if (prints_paths()) print_cpu_path(prepared.low_rank);
    problems.push_back(std::move(prepared.low_rank));
  }

  // The low-rank part is added before the last base product. All of these round the sum to dx's
  // type: fewer roundings of less than calls of their own and the sum of their results take.
  for (size_t p = 0; p + 1 < products.size(); ++p) {
    const auto& [rows, weight] = products[p];
    p == 0 ? product_out(dx_rows, rows, weight) : add_product_(dx_rows, rows, weight);
  }
  if (products.size() == 1) dx_rows.zero_();
  if (!problems.empty()) low_rank_backward_together(problems, together);
  if (wants_x) DenseProduct(products.back().second).add_gradient(dx_rows, products.back().first);
  for (const size_t i : others) {
    const Gradients gradients = layer_bwd(layers[i], &lora_linear_bwd_checked);
    put_gradients(all, i, gradients);
    if (wants_x) dx.add_(std::get<kGradX>(gradients));
  }
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_multi_fwd", flat<&lora_linear_multi_fwd_cpu>);
  m.impl("lora_linear_multi_bwd", flat<&lora_linear_multi_bwd_cpu>);
}

}  // namespace lora_ext
