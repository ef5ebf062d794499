// column_scale on the CPU: one pass forward, one backward.
#include "ops/column_scale.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/backend.h"
#include "cpu/column_scale.h"

namespace lora_ext {
namespace {

// A smaller range does not pay for waking a thread.
int64_t rows_per_part(int64_t N) {
  constexpr int64_t kMinElements = int64_t{1} << 14;
  return std::max<int64_t>(1, kMinElements / N);
}

}  // namespace

void column_scale_rows(at::ScalarType base, const ColumnScaleArgs& args, int64_t M) {
  at::parallel_for(0, M, rows_per_part(args.N), [&](int64_t begin, int64_t end) {
    cpu_kernels(base).column_scale.forward_rows(args, begin, end);
  });
}

namespace {

Tensor column_scale_cpu(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  check_column_scale("column_scale", "z", z, scale, bias);
  Tensor y = at::empty(z.sizes(), z.options());
  if (y.numel() == 0) return y;
  const auto compute = at::toOpMathType(z.scalar_type());
  const Tensor rows = as_rows(z), factors = as_vector(scale, compute);
  const Tensor offsets = as_vector(bias, compute);
  const int64_t M = rows.size(0), N = rows.size(1);
  const ColumnScaleArgs args{N,
                             rows.const_data_ptr(),
                             rows.stride(0),
                             factors.const_data_ptr(),
                             data_or_null(offsets),
                             y.data_ptr(),
                             /*adds=*/false};
  column_scale_rows(z.scalar_type(), args, M);
  return y;
}

ColumnScaleGradients column_scale_bwd_cpu(const Tensor& dy, const OptionalTensor& z,
                                          const Tensor& scale, ColumnScaleMask mask) {
  check_column_scale_bwd(dy, z, scale, mask);
  const auto compute = at::toOpMathType(dy.scalar_type());
  const auto options = dy.options().dtype(compute);
  const int64_t N = dy.size(-1);
  Tensor dz = gradient_or_empty(mask[kGradZ], dy);
  Tensor dscale = at::zeros({mask[kGradScale] ? N : 0}, options);
  Tensor dbias = at::zeros({mask[kGradOffset] ? N : 0}, options);
  if (dy.numel() == 0) return {dz, dscale, dbias};
  const Tensor rows = as_rows(dy), factors = as_vector(scale, compute);
  const Tensor z_rows = mask[kGradScale] ? as_rows(*z) : Tensor();
  const int64_t M = rows.size(0);
  const int64_t parts = parts_for_sums(
      M, std::min<int64_t>(at::get_num_threads(), M / std::max<int64_t>(64, rows_per_part(N))));
  const ColumnScaleBackwardArgs args{N,
                                     rows.const_data_ptr(),
                                     rows.stride(0),
                                     mask[kGradScale] ? z_rows.const_data_ptr() : nullptr,
                                     mask[kGradScale] ? z_rows.stride(0) : 0,
                                     factors.const_data_ptr(),
                                     mask[kGradZ] ? dz.data_ptr() : nullptr};
  // Every part has sums of its own, and two rows to sum a few rows in.
  Tensor sums = at::zeros({parts, 4, N}, options);
  parallel_parts(M, parts, [&](int64_t part, int64_t begin, int64_t end) {
    char* own = static_cast<char*>(sums.data_ptr()) + part * 4 * N * sums.element_size();
    const auto row = [&](int64_t i) { return own + i * N * sums.element_size(); };
    cpu_kernels(dy.scalar_type())
        .column_scale.backward_rows(args, begin, end, mask[kGradScale] ? row(0) : nullptr,
                                    mask[kGradOffset] ? row(1) : nullptr, row(2));
  });
  if (mask[kGradScale]) dscale = sums.select(1, 0).sum(0);
  if (mask[kGradOffset]) dbias = sums.select(1, 1).sum(0);
  return {dz, dscale, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("column_scale", &column_scale_cpu);
  m.impl("column_scale_bwd", &column_scale_bwd_cpu);
}

}  // namespace lora_ext
