// Compiled for AVX-512 with AVX512_BF16 only (see CMakeLists.txt).
#include "kernels.h"
#include "simd/bf16_dot_rows.h"

namespace lora_ext::LORA_EXT_ISA {

extern const LoraLinearKernels kBf16Kernels;
const LoraLinearKernels kBf16Kernels = {.scratch_bytes = DotPanel::bytes,
                                        .packed_bytes = packed_pairs_bytes,
                                        .pack = pack_pairs,
                                        .packs_a = true,
                                        .forward_rows = dot_forward_rows,
                                        .backward_rows = dot_backward_rows,
                                        .reduce_a = reduce<BFloat16, BFloat16>,
                                        .reduce_b = dot_reduce_b};

}  // namespace lora_ext::LORA_EXT_ISA
