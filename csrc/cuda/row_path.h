// Which code column_scale, weight_norm and lora_embedding run on CUDA: a pure function.
#pragma once

#include <ATen/core/ScalarType.h>

#include <string>
#include <utility>

namespace lora_ext {

struct RowPath {
  bool kernels;  // of csrc/kernels, which any GPU runs
  const char *name, *reason;

  std::pair<std::string, std::string> told() const { return {name, reason}; }
};

inline RowPath row_path(at::ScalarType base) {
  if (base == at::kDouble) {
    return {false, "cuda aten",
            "the kernels sum in float32: float64 is composed of ATen's operators"};
  }
  return {true, "cuda fused", "one pass, sums in float32"};
}

}  // namespace lora_ext
