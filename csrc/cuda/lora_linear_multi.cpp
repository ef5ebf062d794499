// lora_linear_multi on CUDA. Layers whose own way is the fused kernels of one family run together
// (lora_linear_multi_path.h): x is read once for their low-rank parts, and products share a launch.
// All others are lora_linear's calls.
#include "ops/lora_linear_multi.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "cuda/lora_linear_calls.h"
#include "cuda/lora_linear_multi_path.h"
#include "cuda/trust.h"
#include "kernels/lora_linear_multi.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

// `rows` is x or dy; `x` that of a backward pass, or undefined.
template <class Layer>
CudaMultiLayer facts_of(const Layer& layer, bool backward, const Tensor& rows, const Tensor& x,
                        const OptionalTensor& weight) {
  CudaMultiLayer facts{};
  facts.call = cuda_call_of(backward, rows, x, weight, layer.lora_A, layer.lora_B, layer.dropout);
  facts.adapted = layer.adapted;
  if (!layer.adapted) facts.call.r = 1;
  facts.path = trusted_path(facts.call);
  return facts;
}

// What ran, of layer i of these.
void print_choice(const char* pass, size_t i, const std::vector<CudaMultiLayer>& layers,
                  const CudaMultiChoice& choice) {
  if (!prints_paths()) return;
  const std::string call =
      c10::str("lora_linear_multi ", pass, ", layer ", i, " of ", layers.size());
  if (choice.alone[i] != nullptr) {
    return print_path(call, "a call of lora_linear", choice.alone[i]);
  }
  const CudaCall& facts = layers[i].call;
  const char* shared = "dA of all in one pass over x, dx in one product";
  if (!facts.backward && facts.dropout) {
    shared = "one launch of products, and a pass over x for its mask";
  } else if (!facts.backward) {
    const bool sm90 = layers[i].path.family == KernelFamily::Sm90;
    shared = sm90 ? "h of all without dropout in one pass over x, one launch of products"
                  : "h of all without dropout in one pass over x";
  }
  print_path(c10::str(call, ", ", facts.M, " rows, ", facts.K, " -> ", facts.N),
             cuda_path_name(layers[i].path),
             c10::str("with ", choice.together - 1, " more of this x: ", shared));
}

std::tuple<TensorVector, TensorVector> lora_linear_multi_fwd_cuda(const LoraLinearMultiCall& call,
                                                                  at::IntArrayRef return_h) {
  const std::vector<LayerOfMulti> layers = checked_layers_of(call, return_h);
  const c10::cuda::CUDAGuard guard(call.x.device());
  if (call.x.numel() == 0) return lora_linear_multi_fwd_composed(call, return_h);
  // Copied once for all layers if it must be.
  const Tensor rows = as_rows(call.x), x = rows.view(call.x.sizes());
  std::vector<CudaMultiLayer> facts;
  for (const LayerOfMulti& layer : layers) {
    facts.push_back(facts_of(layer, false, rows, Tensor(), layer.weight));
  }
  const CudaMultiChoice choice = choose_cuda_multi(facts);
  TensorVector y, h;
  std::vector<LowRankForward> problems;
  std::vector<Tensor> weights;
  std::vector<KernelOptions> options;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [adapted, given, weight, bias, A, B, lora_bias, scaling, dropout] = layers[i];
    print_choice("forward", i, facts, choice);
    if (choice.alone[i] != nullptr) {
      auto [own_y, own_h] = layer_fwd(layers[i], return_h[i] != 0, &lora_linear_fwd);
      y.push_back(own_y), h.push_back(own_h);
      continue;
    }
    PreparedForward prepared = lora_linear_prepare_fwd(
        {x, weight, bias, A, B, lora_bias, scaling, dropout}, adapted && return_h[i] != 0);
    y.push_back(prepared.y), h.push_back(prepared.h);
    problems.push_back(std::move(prepared.low_rank));
    problems.back().bias = in_pairs(problems.back().bias);
    weights.push_back(readable(weight)), options.emplace_back(scaling, dropout);
  }
  if (problems.empty()) return {y, h};
  CudaScratch scratch(x.options());
  const auto adapter = layers[choice.first].lora_A.scalar_type();
  with_types(x.scalar_type(), adapter, [&](auto base, auto of_adapter) {
    using T = decltype(base);
    using TA = decltype(of_adapter);
    std::vector<ForwardCall<T, TA>> calls;
    for (size_t p = 0; p < problems.size(); ++p) {
      calls.push_back(forward_call<T, TA>(problems[p], weights[p], options[p]));
    }
    run_multi_forward<T, TA>(calls, scratch.allocator(), at::cuda::getCurrentCUDAStream(),
                             facts[choice.first].path.family);
  });
  return {y, h};
}

MultiGradients lora_linear_multi_bwd_cuda(const LoraLinearMultiBackwardCall& call, bool wants_x,
                                          at::IntArrayRef wanted, OptionalType dx_type) {
  const std::vector<BackwardLayerOfMulti> layers = checked_layers_of(call, wants_x, wanted);
  const Tensor& dy = call.dy[0];
  const c10::cuda::CUDAGuard guard(dy.device());
  const int64_t M = count_rows(dy).expect_int(), K = layers[0].lora_A.size(1);
  if (M == 0 || K == 0 || sums_in_other_type(dy, wants_x, dx_type)) {
    return separate_gradients(layers, &lora_linear_bwd, dx_type);
  }
  const OptionalTensor x = call.x.has_value() ? OptionalTensor(as_rows(*call.x)) : std::nullopt;
  std::vector<Tensor> rows;
  std::vector<CudaMultiLayer> facts;
  for (const BackwardLayerOfMulti& layer : layers) {
    rows.push_back(as_rows(layer.dy));
    facts.push_back(facts_of(layer, true, rows.back(), x.value_or(Tensor()), layer.weight));
    const GradientMask& mask = layer.mask;
    facts.back().makes_h = mask[kGradB] && !layer.h.has_value();
    facts.back().wants_nothing = !(mask[kGradX] || mask[kGradA] || mask[kGradB]);
  }
  const CudaMultiChoice choice = choose_cuda_multi(facts);
  for (size_t i = 0; i < layers.size(); ++i) print_choice("backward", i, facts, choice);
  if (choice.together == 0) return separate_gradients(layers, &lora_linear_bwd, dx_type);

  MultiGradients all = no_gradients(layers.size());
  Tensor& dx = std::get<kGradX>(all);
  dx = gradient_or_empty(wants_x, dy, with_width(dy, K));
  std::vector<LowRankBackward> problems;
  std::vector<Tensor> weights;
  std::vector<KernelOptions> options;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (choice.alone[i] != nullptr) continue;
    const BackwardLayerOfMulti& layer = layers[i];
    GradientMask mask = layer.mask;
    mask[kGradX] = false;
    PreparedBackward prepared =
        lora_linear_prepare_bwd({rows[i], x, layer.h, layer.weight, layer.lora_A, layer.lora_B,
                                 layer.scaling, layer.dropout},
                                mask);
    put_gradients(all, i, prepared.gradients);
    problems.push_back(std::move(prepared.low_rank));
    problems.back().dx = wants_x ? dx.view({M, K}) : Tensor();
    weights.push_back(wants_x ? readable(*layer.weight) : Tensor());
    options.emplace_back(layer.scaling, layer.dropout);
  }
  CudaScratch scratch(dy.options());
  const auto adapter = layers[choice.first].lora_A.scalar_type();
  with_types(dy.scalar_type(), adapter, [&](auto base, auto of_adapter) {
    using T = decltype(base);
    using TA = decltype(of_adapter);
    std::vector<BackwardCall<T, TA>> calls;
    for (size_t p = 0; p < problems.size(); ++p) {
      calls.push_back(backward_call<T, TA>(problems[p], weights[p], options[p]));
    }
    run_multi_backward<T, TA>(calls, scratch.allocator(), at::cuda::getCurrentCUDAStream(),
                              facts[choice.first].path.family);
  });
  for (size_t i = 0; i < layers.size(); ++i) {
    if (choice.alone[i] == nullptr) continue;
    const Gradients own = layer_bwd(layers[i], &lora_linear_bwd);
    put_gradients(all, i, own);
    if (wants_x) dx.add_(std::get<kGradX>(own));
  }
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear_multi_fwd", flat<&lora_linear_multi_fwd_cuda>);
  m.impl("lora_linear_multi_bwd", flat<&lora_linear_multi_bwd_cuda>);
}

}  // namespace lora_ext
