// draw_rng_state and dropout_mask on CUDA.
#include "ops/dropout.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <mutex>

#include "../common/dropout.h"
#include "kernels/dropout.h"

namespace lora_ext {
namespace {

at::Tensor draw_rng_state_cuda(const at::Tensor& like) {
  const c10::cuda::CUDAGuard guard(like.device());
  auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(like.device().index()));
  at::PhiloxCudaState philox;
  {
    std::lock_guard<std::mutex> lock(generator->mutex_);
    philox = generator->philox_cuda_state(4);  // its offsets are multiples of 4
  }
  PhiloxState state{};
  state.captured = philox.captured_;
  if (philox.captured_) {
    state.seed_pointer = philox.seed_.ptr, state.offset_pointer = philox.offset_.ptr;
    state.offset_in_graph = philox.offset_intragraph_;
  } else {
    state.seed = philox.seed_.val, state.offset = philox.offset_.val;
  }
  at::Tensor words = at::empty({2}, like.options().dtype(at::kLong));
  fill_rng_state(state, words.data_ptr<int64_t>(), at::cuda::getCurrentCUDAStream());
  return words;
}

at::Tensor dropout_mask_cuda(const at::Tensor& rng_state, int64_t rows, int64_t columns,
                             double dropout_p, int64_t first_row) {
  check_dropout_mask(rng_state, rows, columns, dropout_p, first_row);
  const c10::cuda::CUDAGuard guard(rng_state.device());
  at::Tensor keep = at::empty({rows, columns}, rng_state.options().dtype(at::kBool));
  if (keep.numel() == 0) return keep;
  const at::Tensor state = rng_state.contiguous();
  dropout_mask(state.const_data_ptr<int64_t>(), dropout_threshold(dropout_p), first_row, rows,
               columns, keep.data_ptr<bool>(), at::cuda::getCurrentCUDAStream());
  return keep;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("draw_rng_state", &draw_rng_state_cuda);
  m.impl("dropout_mask", &dropout_mask_cuda);
}

}  // namespace lora_ext
