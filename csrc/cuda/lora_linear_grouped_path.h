// Whether the kernels run a call of lora_linear_grouped on CUDA, from facts alone.
#pragma once

#include "cuda/lora_linear_path.h"

namespace lora_ext {

struct GroupedPath {
  bool kernels;  // for all low-rank parts; else ATen's products, one adapter after another
  const char* reason;

  const char* name() const { return kernels ? "cuda hybrid sm_80" : "cuda cublas"; }
};

// `call` has the largest rank of the adapters, at least 1; `fp16`: its base is; `wrong`: the
// kernels were found so.
inline GroupedPath choose_grouped_path(const CudaCall& call, bool fp16, int compute_capability,
                                       bool built, CudaWish wish, bool wrong) {
  if (const char* reason = why_no_kernels(call, compute_capability, built)) {
    return {false, reason};
  }
  constexpr int64_t kMaxRank = 256;  // 64 at a time: beyond, the low-rank products are worth a BLAS
  if (call.r > kMaxRank) return {false, "the kernels of many adapters take ranks 1 to 256"};
  if (wish == CudaWish::Composed) return {false, name_of(wish).asked};
  if (fp16 && wish == CudaWish::Auto) {  // unlike lora_linear's, see fp16_range.h
    return {false, "the kernels of many adapters round h and dh to fp16 without a scale"};
  }
  if (call.rows == Rows::Any) {
    return {false,
            "rows that begin at no multiple of 16 bytes, as where N or K is no multiple of 8, are "
            "cuBLAS's"};
  }
  if (wrong) {
    return {false, "the kernels were wrong at their first use on this GPU, as a warning said"};
  }
  return {true, "one launch of each low-rank pass for all adapters, base product by cuBLAS"};
}

}  // namespace lora_ext
