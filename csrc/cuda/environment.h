// The environment variables of the CUDA backend, which any build checks.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/lora_linear_path.h"
#include "kernels/switches.h"

namespace lora_ext {

// Of all paths from the `first` on: 'fused', 'hybrid', 'composed'
inline std::string quoted_paths(CudaWish first) {
  std::string names;
  for (size_t i = static_cast<size_t>(first); i < std::size(kCudaPaths); ++i) {
    names += (names.empty() ? "'" : ", '") + std::string(kCudaPaths[i].name) + "'";
  }
  return names;
}

inline CudaWish read_cuda_wish() {
  const char* value = std::getenv("LORA_EXT_CUDA_PATH");
  if (value == nullptr || *value == '\0') return CudaWish::Auto;
  if (const auto wish = cuda_wish_named(value)) return *wish;
  TORCH_CHECK(false, "LORA_EXT_CUDA_PATH: got '", value, "', expected ",
              quoted_paths(CudaWish::Auto), "; unset it for 'auto'");
}

// LORA_EXT_CUDA_PATH and LORA_EXT_CUDA_OFF.
inline void check_cuda_environment() {
  read_cuda_wish();
  try {
    switched_off(Mechanism::kCluster);
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
}

}  // namespace lora_ext
