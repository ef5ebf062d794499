// Which of its instruction sets this CPU has, and which of them the environment allows.
#include "cpu/capability.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(LORA_EXT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_ext {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(__x86_64__)
// The name "amx-bf16" of __builtin_cpu_supports is not known to all compilers that do for the rest.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

// Linux gives a process the registers of AMX where it asks for them.
bool may_use_amx() {
#if defined(LORA_EXT_AMX)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return has_amx_bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuCapability supported() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return may_use_amx() ? CpuCapability::AmxBf16 : CpuCapability::Avx512Bf16;
  }
  if (avx512) return CpuCapability::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return CpuCapability::Avx2;
  }
#endif
  return CpuCapability::Default;
}

CpuCapability choose() {
  const char* limit = std::getenv("LORA_EXT_CPU_CAPABILITY");
  if (limit == nullptr || *limit == '\0') return supported();
  for (int level = 0; level <= static_cast<int>(CpuCapability::AmxBf16); ++level) {
    if (std::string(limit) == kNames[level]) {
      return std::min(supported(), static_cast<CpuCapability>(level));
    }
  }
  TORCH_CHECK(
      false, "LORA_EXT_CPU_CAPABILITY: got '", limit,
      "', expected 'default', 'avx2', 'avx512', 'avx512_bf16' or 'amx_bf16'; unset it to use "
      "the best this CPU has");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* cpu_capability_name(CpuCapability capability) {
  return kNames[static_cast<int>(capability)];
}

bool cpu_multiplies(at::ScalarType dtype) {
  if (!at::isReducedFloatingType(dtype)) return true;
  if (cpu_capability() < CpuCapability::Avx512Bf16) return false;
#if defined(__x86_64__)
  if (dtype == at::kHalf) return __builtin_cpu_supports("avx512fp16");
#endif
  return true;
}

bool cpu_multiplies_faster(at::ScalarType dtype) {
  if (!at::isReducedFloatingType(dtype) || !cpu_multiplies(dtype)) return false;
#if defined(__x86_64__)
  static const bool only_dot = __builtin_cpu_is("intel") && !has_amx_bf16();
  if (dtype == at::kBFloat16) return !only_dot;
#endif
  return true;
}

}  // namespace lora_ext
