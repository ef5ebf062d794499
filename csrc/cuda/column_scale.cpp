// column_scale on CUDA: one pass forward, one backward.
#include "ops/column_scale.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/operands.h"
#include "cuda/row_path.h"
#include "kernels/column_scale.h"
#include "ops/print_path.h"

namespace lora_ext {
namespace {

RowPath column_scale_path(const char* op, const Tensor& rows) {
  const RowPath path = row_path(rows.scalar_type());
  if (prints_paths()) {
    print_path(
        c10::str(op, " of ", count_rows(rows), " x ", rows.size(-1), ", ", rows.scalar_type()),
        path.name, path.reason);
  }
  return path;
}

Tensor column_scale_cuda(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  check_column_scale("column_scale", "z", z, scale, bias);
  const c10::cuda::CUDAGuard guard(z.device());
  if (!column_scale_path("column_scale", z).kernels) return column_scale_composed(z, scale, bias);
  Tensor y = at::empty(z.sizes(), z.options());
  if (y.numel() == 0) return y;
  const Tensor rows = as_rows(z), factors = aligned_vector(scale, at::kFloat);
  const Tensor offsets = aligned_vector(bias, at::kFloat);
  with_base_type(z.scalar_type(), [&](auto base) {
    using T = decltype(base);
    const ColumnScaleCall<T> call{.z = matrix<T>(rows),
                                  .scale = data_or_null<float>(factors),
                                  .bias = data_or_null<float>(offsets),
                                  .y = out_or_null<T>(y)};
    run_column_scale(call, at::cuda::getCurrentCUDAStream());
  });
  return y;
}

ColumnScaleGradients column_scale_bwd_cuda(const Tensor& dy, const OptionalTensor& z,
                                           const Tensor& scale, ColumnScaleMask mask) {
  check_column_scale_bwd(dy, z, scale, mask);
  const c10::cuda::CUDAGuard guard(dy.device());
  if (!column_scale_path("column_scale_bwd", dy).kernels) {
    return column_scale_bwd_composed(dy, z, scale, mask);
  }
  const int64_t N = dy.size(-1);
  const auto sums = [&](bool wanted) {
    Tensor sum = at::empty({wanted ? N : 0}, dy.options().dtype(at::kFloat));
    return dy.numel() == 0 ? sum.zero_() : sum;
  };
  Tensor dz = gradient_or_empty(mask[kGradZ], dy);
  Tensor dscale = sums(mask[kGradScale]), dbias = sums(mask[kGradOffset]);
  const bool nothing = std::none_of(mask.begin(), mask.end(), [](bool wanted) { return wanted; });
  if (dy.numel() == 0 || nothing) return {dz, dscale, dbias};
  const Tensor rows = as_rows(dy), factors = aligned_vector(scale, at::kFloat);
  const Tensor z_rows = mask[kGradScale] ? as_rows(*z) : Tensor();
  CudaScratch scratch(dy.options());
  with_base_type(dy.scalar_type(), [&](auto base) {
    using T = decltype(base);
    const ColumnScaleBackwardCall<T> call{
        .dy = matrix<T>(rows),
        .z = matrix<T>(z_rows, rows.size(0), N),
        .scale = data_or_null<float>(factors),
        .dz = mask[kGradZ] ? out_or_null<T>(dz) : nullptr,
        .dscale = mask[kGradScale] ? out_or_null<float>(dscale) : nullptr,
        .dbias = mask[kGradOffset] ? out_or_null<float>(dbias) : nullptr};
    run_column_scale_backward(call, scratch.allocator(), at::cuda::getCurrentCUDAStream());
  });
  return {dz, dscale, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("column_scale", &column_scale_cuda);
  m.impl("column_scale_bwd", &column_scale_bwd_cuda);
}

}  // namespace lora_ext
