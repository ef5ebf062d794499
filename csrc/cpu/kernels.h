// The vector kernels behind the CPU backend: of every operator, for each pair of storage types and
// each instruction set. Everything in these tables is plain data, so that files compiled for
// different instruction sets share no inline code (see simd/types.h).
#pragma once

#include "column_scale_kernels.h"
#include "dora_linear_kernels.h"
#include "dropout_kernels.h"
#include "gated_kernels.h"
#include "lora_embedding_kernels.h"
#include "lora_linear_kernels.h"
#include "merge_kernels.h"
#include "quantized_kernels.h"
#include "weight_norm_kernels.h"

namespace lora_ext {

// Base and adapter storage type. The compute type is float, for F64 double.
enum class DtypePair { F64, F32, BF16, BF16_F32, F16, F16_F32 };
constexpr int kDtypePairs = 6;

// For one pair; without adapters only the base counts.
struct CpuKernels {
  LoraLinearKernels lora_linear;
  LoraEmbeddingKernels lora_embedding;
  DoraLinearKernels dora_linear;
  ColumnScaleKernels column_scale;
  DropoutKernels dropout;
  GatedKernels gated;
  MergeKernels merge;
  QuantizedKernels quantized;
  WeightNormKernels weight_norm;
};

namespace isa_default {
extern const CpuKernels kKernels[kDtypePairs];
}
namespace isa_avx2 {
extern const CpuKernels kKernels[kDtypePairs];
}
namespace isa_avx512 {
extern const CpuKernels kKernels[kDtypePairs];
}
namespace isa_avx512_bf16 {
extern const LoraLinearKernels kBf16Kernels;
}
namespace isa_amx_bf16 {  // where the compiler knows AMX
extern const LoraLinearKernels kBf16Kernels;
}

// Those for cpu_capability().
const CpuKernels& cpu_kernels(DtypePair pair);

// Kernels for bf16 base and adapters on bf16 dot products, of vectors or of AMX's tiles; null
// without the capability.
const LoraLinearKernels* bf16_dot_kernels();

}  // namespace lora_ext
