// What the vector kernels may use on this CPU.
#pragma once

#include <c10/core/ScalarType.h>

namespace lora_ext {

// The environment variable LORA_EXT_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16, amx_bf16)
// lowers it, once per process.
enum class CpuCapability { Default, Avx2, Avx512, Avx512Bf16, AmxBf16 };
CpuCapability cpu_capability();
const char* cpu_capability_name(CpuCapability capability);

// Whether this CPU has instructions for products of the dtype, which ATen's BLAS then uses.
bool cpu_multiplies(at::ScalarType dtype);

// Whether those make more products in the same time than float32's: AMX, by which PyTorch's took a
// third of float32's time, and AMD's AVX512_BF16, half; with Intel's AVX512_BF16 they took 1.4
// times as long (docs/measured.md).
bool cpu_multiplies_faster(at::ScalarType dtype);

}  // namespace lora_ext
