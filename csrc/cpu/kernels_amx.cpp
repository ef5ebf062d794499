// Compiled for AVX-512 with AVX512_BF16 and AMX only (see CMakeLists.txt).
#include "lora_linear_kernels.h"
#include "simd/amx_math.h"
#include "simd/lora_linear_multi_rows.h"
#include "simd/lora_linear_rows.h"
#include "simd/lora_linear_single_rows.h"
#include "simd/transpose.h"

namespace lora_ext::LORA_EXT_ISA {
namespace {

// A kernel on this thread's tiles.
template <auto kKernel>
struct OnTiles;
template <class... Args, void (*kKernel)(Args...)>
struct OnTiles<kKernel> {
  static void run(Args... args) {
    const WholeTiles tiles;
    kKernel(args...);
  }
};

}  // namespace

extern const LoraLinearKernels kBf16Kernels = {
    .scratch_bytes = Panel<AmxMath>::bytes,
    .packed_bytes = packed_pairs_bytes,
    .pack = pack_pairs,
    .forward_rows = OnTiles<lora_linear_forward_rows<AmxMath>>::run,
    .single_rows_bytes = single_rows_bytes<float>,
    .single_rows = lora_linear_single_rows<BFloat16, BFloat16>,
    .backward_rows = OnTiles<lora_linear_backward_rows<AmxMath>>::run,
    .multi_scratch_bytes = multi_bytes<AmxMath>,
    .multi_forward_rows = OnTiles<lora_linear_multi_forward_rows<AmxMath>>::run,
    .multi_backward_rows = OnTiles<lora_linear_multi_backward_rows<AmxMath>>::run,
    .reduce_a = reduce<float, BFloat16>,
    .reduce_b = reduce_transposed<float, BFloat16>};

}  // namespace lora_ext::LORA_EXT_ISA
