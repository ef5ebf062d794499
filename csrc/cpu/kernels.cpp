#include "kernels.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lora_ext {
namespace {

const CpuKernels& choose() {
  const char* wish = std::getenv("LORA_EXT_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "" : wish;
  TORCH_CHECK(limit.empty() || limit == "default" || limit == "avx2" || limit == "avx512",
              "LORA_EXT_CPU_CAPABILITY: got '", limit,
              "', expected 'default', 'avx2' or 'avx512'; unset it to use the best this CPU has");
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx512 && (limit.empty() || limit == "avx512")) return isa_avx512::kKernels;
  if (avx2 && limit != "default") return isa_avx2::kKernels;
#endif
  return isa_default::kKernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace lora_ext
