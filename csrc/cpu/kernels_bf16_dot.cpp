// Compiled for AVX-512 with AVX512_BF16 only (see CMakeLists.txt).
#include "lora_linear_kernels.h"
#include "simd/bf16_dot_math.h"
#include "simd/lora_linear_multi_rows.h"
#include "simd/lora_linear_rows.h"
#include "simd/lora_linear_single_rows.h"
#include "simd/transpose.h"

namespace lora_ext::LORA_EXT_ISA {

extern const LoraLinearKernels kBf16Kernels = {
    .scratch_bytes = Panel<Bf16DotMath>::bytes,
    .packed_bytes = packed_pairs_bytes,
    .pack = pack_pairs,
    .forward_rows = lora_linear_forward_rows<Bf16DotMath>,
    .single_rows_bytes = single_rows_bytes<float>,
    .single_rows = lora_linear_single_rows<BFloat16, BFloat16>,
    .backward_rows = lora_linear_backward_rows<Bf16DotMath>,
    .multi_scratch_bytes = multi_bytes<Bf16DotMath>,
    .multi_forward_rows = lora_linear_multi_forward_rows<Bf16DotMath>,
    .multi_backward_rows = lora_linear_multi_backward_rows<Bf16DotMath>,
    .reduce_a = reduce<float, BFloat16>,
    .reduce_b = reduce_transposed<float, BFloat16>};

}  // namespace lora_ext::LORA_EXT_ISA
