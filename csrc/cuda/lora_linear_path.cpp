// What lora_linear_path.h's candidates are judged by: the environment, what was measured, how
// tensors lie.
#include "cuda/lora_linear_path.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <string>

#include "cuda/environment.h"
#include "cuda/lora_linear.h"
#include "cuda/trust.h"

namespace lora_ext {
CudaWish cuda_wish() {
  static const CudaWish wish = read_cuda_wish();
  return wish;
}

TunedPaths& tuned_paths() {
  static TunedPaths paths;
  return paths;
}

Rows rows_of(const at::Tensor& matrix) {
  return rows_of(matrix.const_data_ptr(), matrix.size(0), matrix.stride(0), matrix.size(1));
}

CudaCall make_cuda_call(bool backward, int device, int64_t tokens, int64_t out_features,
                        int64_t in_features, int64_t r, at::ScalarType base, at::ScalarType adapter,
                        bool dropout, const std::optional<at::Tensor>& weight) {
  const bool half = base == at::kHalf || base == at::kBFloat16;
  Rows rows = rows_of_sizes(out_features, in_features);
  bool transposed = false;
  if (weight && weight->dim() == 2) {
    // As it lies, by rows or by columns; otherwise it is copied.
    transposed = weight->stride(1) != 1 && weight->stride(0) == 1;
    if (weight->stride(1) == 1)
      rows = std::min(rows, rows_of(*weight));
    else if (transposed)
      rows = std::min(rows, rows_of(weight->t()));
  }
  return {backward,
          device,
          tokens,
          out_features,
          in_features,
          r,
          static_cast<int>(base),
          static_cast<int>(adapter),
          half,
          dropout,
          rows,
          transposed};
}

CudaPath cuda_path(const CudaCall& call, int compute_capability) {
#if defined(LORA_EXT_SM90)
  constexpr bool sm90 = true;
#else
  constexpr bool sm90 = false;
#endif
  const bool built = built_for(LORA_EXT_CUDA_TARGETS, compute_capability);
  const CudaPath path = choose_cuda_path(
      {call, compute_capability, built, sm90, cuda_wish(), tuned_paths().find(call)});
  if (path.kernels != CudaPath::Kernels::Composed && found_wrong(path.family, call.device)) {
    return {CudaPath::Kernels::Composed, path.family,
            "the kernels were wrong at their first use on this GPU, as a warning said"};
  }
  return path;
}

bool has_cuda_kernels(const CudaCall& call, int compute_capability) {
  const bool built = built_for(LORA_EXT_CUDA_TARGETS, compute_capability);
  return why_no_kernels(call, compute_capability, built) == nullptr;
}

std::pair<std::string, std::string> explain_lora_linear_cuda(CudaCall call,
                                                             int compute_capability) {
  call.backward = false;
  const CudaPath forward = cuda_path(call, compute_capability);
  call.backward = true;
  const CudaPath backward = cuda_path(call, compute_capability);
  const std::string name = cuda_path_name(forward), other = cuda_path_name(backward);
  if (name == other) return {name, forward.reason};
  return {name + ", backward " + other, forward.reason};
}

void set_tuned_cuda_path(const CudaCall& call, const std::optional<std::string>& path) {
  std::optional<CudaWish> wish;
  if (path) wish = cuda_wish_named(*path);
  TORCH_CHECK_VALUE(!path || (wish && *wish != CudaWish::Auto), "set_tuned_cuda_path: path: got '",
                    path.value_or(""), "', expected ", quoted_paths(CudaWish::Fused), " or None");
  tuned_paths().set(call, wish);
}

}  // namespace lora_ext
