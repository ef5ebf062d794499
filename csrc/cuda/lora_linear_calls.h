// Calls of lora_linear as the kernels take them, and what their path is chosen by.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "../common/dropout.h"
#include "cuda/lora_linear.h"
#include "cuda/operands.h"
#include "kernels/lora_linear.h"
#include "ops/lora_linear_prepare.h"
#include "ops/print_path.h"

namespace lora_ext {

// Scaling and dropout as the kernels take them, with the tensors that they point into. Nothing is
// read from the device, so that a CUDA graph can capture a call.
struct KernelOptions {
  Tensor scaling_tensor, rng_state;
  float scaling;
  const float* scaling_factor = nullptr;
  Dropout dropout{false, 0, 1.0f, nullptr};

  KernelOptions(const HiddenScale& given, const LoraDropout& of_x)
      : scaling(static_cast<float>(given.number)) {
    if (given.tensor.has_value()) {
      scaling_tensor = given.tensor->to(at::kFloat);
      scaling_factor = scaling_tensor.const_data_ptr<float>();
    }
    if (!of_x.enabled()) return;
    rng_state = of_x.rng_state->contiguous();
    dropout = {true, dropout_threshold(of_x.p), static_cast<float>(of_x.survivor()),
               rng_state.const_data_ptr<int64_t>()};
  }
};

// Whether the weight [N, K] lies as [K, N], as GPT-2's Conv1D keeps it.
inline bool lies_transposed(const Tensor& weight) {
  return weight.stride(1) != 1 && weight.stride(0) == 1;
}

// The weight [N, K] as it lies, copied only if it lies neither way; without data if there is none.
template <class T>
Weight<T> weight_of(const Tensor& weight, int64_t N, int64_t K) {
  if (weight.defined() && lies_transposed(weight)) return {matrix<T>(weight.t()), true};
  return {matrix<T>(weight, N, K), false};
}

// f(T{}, TA{}) with the storage types of base and adapter.
template <class F>
void with_types(at::ScalarType base, at::ScalarType adapter, const F& f) {
  const bool mixed = adapter == at::kFloat;
  if (base == at::kBFloat16) return mixed ? f(Bf16{}, float{}) : f(Bf16{}, Bf16{});
  mixed ? f(Fp16{}, float{}) : f(Fp16{}, Fp16{});
}

// What the kernels are given as the weight: itself, or a copy where neither rows nor columns lie
// together.
inline Tensor readable(const Tensor& weight) {
  return lies_transposed(weight) ? weight : as_rows(weight);
}

// The bias, which kernels read in pairs: a copy where a view of it begins between two.
inline Tensor in_pairs(const Tensor& bias) {
  const bool aligned = reinterpret_cast<uintptr_t>(data_or_null(bias)) % (2 * sizeof(float)) == 0;
  return aligned ? bias : bias.clone();
}

// The low-rank part into y; the base product too if there is a weight [N, K]. The call points into
// all of these.
template <class T, class TA>
ForwardCall<T, TA> forward_call(const LowRankForward& problem, const Tensor& weight,
                                const KernelOptions& options) {
  const auto& [x, lora_A, lora_B] = std::tie(problem.x, problem.lora_A, problem.lora_B);
  return {.x = matrix<T>(x),
          .weight = weight_of<T>(weight, lora_B.size(0), x.size(1)),
          .bias = data_or_null<float>(problem.bias),
          .lora_A = data_or_null<TA>(lora_A),
          .lora_B = data_or_null<TA>(lora_B),
          .r = static_cast<int>(lora_A.size(0)),
          .scaling = options.scaling,
          .scaling_factor = options.scaling_factor,
          .dropout = options.dropout,
          .y = out_or_null<T>(problem.y),
          .h = out_or_null<float>(problem.h)};
}

// The low-rank part into dx, dA and dB; the base product too, into dx, if there is a weight.
template <class T, class TA>
BackwardCall<T, TA> backward_call(const LowRankBackward& problem, const Tensor& weight,
                                  const KernelOptions& options) {
  const auto& [dy, lora_A, lora_B] = std::tie(problem.dy, problem.lora_A, problem.lora_B);
  const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1);
  return {.dy = matrix<T>(dy),
          .x = matrix<T>(problem.x, M, K),
          .weight = weight_of<T>(weight, N, K),
          .h = data_or_null<float>(problem.h),
          .lora_A = data_or_null<TA>(lora_A),
          .lora_B = data_or_null<TA>(lora_B),
          .r = static_cast<int>(lora_A.size(0)),
          .scaling = options.scaling,
          .scaling_factor = options.scaling_factor,
          .dropout = options.dropout,
          .dx = out_or_null<T>(problem.dx),
          .dA = out_or_null<TA>(problem.dA),
          .dB = out_or_null<TA>(problem.dB)};
}

// `rows` is x [M, K] or dy [M, N]; `x` that of a backward pass which reads it, or undefined.
inline CudaCall cuda_call_of(bool backward, const Tensor& rows, const Tensor& x,
                             const OptionalTensor& weight, const Tensor& lora_A,
                             const Tensor& lora_B, const LoraDropout& dropout) {
  CudaCall call = make_cuda_call(backward, rows.get_device(), rows.size(0), lora_B.size(0),
                                 lora_A.size(1), lora_A.size(0), rows.scalar_type(),
                                 lora_A.scalar_type(), dropout.enabled(), weight);
  call.aligned_A = reinterpret_cast<uintptr_t>(lora_A.const_data_ptr()) % 16 == 0;
  for (const Tensor& matrix : {rows, x}) {
    if (matrix.defined()) call.rows = std::min(call.rows, rows_of(matrix));
  }
  return call;
}

// Of a call that reads x or dy [M, ...].
inline void print_cuda_path(const char* pass, const Tensor& rows, const Tensor& lora_A,
                            const Tensor& lora_B, const LoraDropout& dropout, const CudaPath& path,
                            const std::string& reason) {
  print_path({pass, rows.size(0), lora_B.size(0), lora_A.size(1), lora_A.size(0),
              rows.scalar_type(), lora_A.scalar_type(), dropout.enabled()},
             cuda_path_name(path), reason);
}

}  // namespace lora_ext
