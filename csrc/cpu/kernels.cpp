// The tables of vector kernels for what this CPU can do.
#include "cpu/kernels.h"

#include "cpu/capability.h"

namespace lora_ext {

const CpuKernels& cpu_kernels(DtypePair pair) {
  const auto* kernels = isa_default::kKernels;
#if defined(__x86_64__)
  if (cpu_capability() == CpuCapability::Avx2) kernels = isa_avx2::kKernels;
  if (cpu_capability() >= CpuCapability::Avx512) kernels = isa_avx512::kKernels;
#endif
  return kernels[static_cast<int>(pair)];
}

const LoraLinearKernels* bf16_dot_kernels() {
#if defined(LORA_EXT_AMX)
  if (cpu_capability() == CpuCapability::AmxBf16) return &isa_amx_bf16::kBf16Kernels;
#endif
#if defined(__x86_64__)
  if (cpu_capability() >= CpuCapability::Avx512Bf16) return &isa_avx512_bf16::kBf16Kernels;
#endif
  return nullptr;
}

}  // namespace lora_ext
