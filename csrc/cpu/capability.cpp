#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace lora_ext {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

CpuCapability supported() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::Avx512Bf16;
  if (avx512) return CpuCapability::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return CpuCapability::Avx2;
  }
#endif
  return CpuCapability::Default;
}

CpuCapability choose() {
  const char* wish = std::getenv("LORA_EXT_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return supported();
  for (int limit = 0; limit < 4; ++limit) {
    if (std::string(wish) == kNames[limit]) {
      return std::min(supported(), static_cast<CpuCapability>(limit));
    }
  }
  TORCH_CHECK(false, "LORA_EXT_CPU_CAPABILITY: got '", wish,
              "', expected 'default', 'avx2', 'avx512' or 'avx512_bf16'; unset it to use the best "
              "this CPU has");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* cpu_capability_name(CpuCapability capability) {
  return kNames[static_cast<int>(capability)];
}

const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  if (cpu_capability() >= CpuCapability::Avx512) return isa_avx512::kKernels;
  if (cpu_capability() == CpuCapability::Avx2) return isa_avx2::kKernels;
#endif
  return isa_default::kKernels;
}

const LoraLinearKernels* bf16_dot_kernels() {
#if defined(__x86_64__)
  if (cpu_capability() == CpuCapability::Avx512Bf16) return &isa_avx512_bf16::kBf16Kernels;
#endif
  return nullptr;
}

}  // namespace lora_ext
