#include "cuda/path.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "cuda/lora_linear.h"

namespace lora_ext {
namespace {

CudaWish read_wish() {
  const char* value = std::getenv("LORA_EXT_CUDA_PATH");
  if (value == nullptr || *value == '\0') return CudaWish::Auto;
  for (const CudaWish wish : {CudaWish::Auto, CudaWish::Fused, CudaWish::Composed}) {
    if (std::string_view(value) == kCudaWishNames[static_cast<int>(wish)]) return wish;
  }
  TORCH_CHECK(false, "LORA_EXT_CUDA_PATH: got '", value,
              "', expected 'auto', 'fused' or 'composed'; unset it for 'auto'");
}

}  // namespace

CudaWish cuda_wish() {
  static const CudaWish wish = read_wish();
  return wish;
}

CudaPath cuda_path(int64_t out_features, int64_t in_features, int64_t r, at::ScalarType base,
                   int compute_capability) {
  const bool half = base == at::kHalf || base == at::kBFloat16;
#if defined(LORA_EXT_SM90)
  constexpr bool sm90 = true;
#else
  constexpr bool sm90 = false;
#endif
  return choose_cuda_path(
      {out_features, in_features, r, half, compute_capability, sm90, cuda_wish()});
}

std::pair<std::string, std::string> explain_lora_linear_cuda(int64_t out_features,
                                                             int64_t in_features, int64_t r,
                                                             at::ScalarType base,
                                                             int compute_capability) {
  const CudaPath path = cuda_path(out_features, in_features, r, base, compute_capability);
  return {cuda_path_name(path.kernels), path.reason};
}

}  // namespace lora_ext
