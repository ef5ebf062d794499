// draw_rng_state, dropout_mask and dropout on the CPU.
#include "ops/dropout.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <mutex>

#include "cpu/backend.h"
#include "cpu/dropout.h"

namespace lora_ext {
namespace {

at::Tensor draw_rng_state_cpu(const at::Tensor&) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  at::Tensor state = at::empty({2}, at::kLong);
  int64_t* words = state.data_ptr<int64_t>();
  std::lock_guard<std::mutex> lock(generator.mutex());
  words[0] = static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
  words[1] = 0;  // every draw is a new seed; the offset is for counter-based generators
  return state;
}

at::Tensor dropout_mask_cpu(const at::Tensor& rng_state, int64_t rows, int64_t columns,
                            double dropout_p, int64_t first_row) {
  check_dropout_mask(rng_state, rows, columns, dropout_p, first_row);
  at::Tensor keep = at::empty({rows, columns}, at::kBool);
  const at::Tensor state = rng_state.contiguous();
  const int64_t* words = state.const_data_ptr<int64_t>();
  const DropoutRng rng{static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
  const auto& kernels = cpu_kernels(DtypePair::F32).dropout;  // a mask is the same for all
  auto* bytes = reinterpret_cast<uint8_t*>(keep.data_ptr<bool>());
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    kernels.mask_rows(rng, dropout_threshold(dropout_p), columns, first_row + begin,
                      first_row + end, bytes + begin * columns);
  });
  return keep;
}

Tensor dropout_cpu(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  check_dropout(x, rng_state, dropout_p);
  Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;
  const Tensor rows = as_rows(x);
  const auto& kernels = cpu_kernels(x.scalar_type()).dropout;
  const DropoutArgs args = dropout_args(dropout_p, rng_state);
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels.rows(rows.const_data_ptr(), rows.stride(0), rows.size(1), args, /*first_row=*/0, begin,
                 end, out.data_ptr());
  });
  return out;
}

}  // namespace

void keep_rows_cpu(const Tensor& out, const Tensor& x, const Tensor& rng_state, double dropout_p,
                   int64_t first_row) {
  const auto& kernels = cpu_kernels(x.scalar_type()).dropout;
  DropoutArgs args = dropout_args(dropout_p, rng_state);
  args.survivor = 1.0;
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels.rows(x.const_data_ptr(), x.stride(0), x.size(1), args, first_row, begin, end,
                 out.data_ptr());
  });
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("draw_rng_state", &draw_rng_state_cpu);
  m.impl("dropout_mask", &dropout_mask_cpu);
  m.impl("dropout", &dropout_cpu);
}

}  // namespace lora_ext
