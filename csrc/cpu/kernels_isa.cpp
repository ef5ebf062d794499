// Compiled once per instruction set, in the namespace LORA_EXT_ISA (see CMakeLists.txt).
#include "kernels.h"
#include "simd/column_scale_rows.h"
#include "simd/dora_linear_rows.h"
#include "simd/dropout_rows.h"
#include "simd/float_math.h"
#include "simd/gated_rows.h"
#include "simd/lora_embedding_rows.h"
#include "simd/lora_linear_multi_rows.h"
#include "simd/lora_linear_rows.h"
#include "simd/lora_linear_single_rows.h"
#include "simd/merge_rows.h"
#include "simd/quantized_few_rows.h"
#include "simd/quantized_rows.h"
#include "simd/transpose.h"
#include "simd/weight_norm_rows.h"

namespace lora_ext::LORA_EXT_ISA {
namespace {

template <class T, class TA>
constexpr CpuKernels kernels_for() {
  using Math = FloatMath<T, TA>;
  using S = typename Math::Sum;
  return {
      .lora_linear = {.scratch_bytes = Panel<Math>::bytes,
                      .packed_bytes = transposed_bytes<S>,
                      .pack = transpose<S, TA>,
                      .forward_rows = lora_linear_forward_rows<Math>,
                      .single_rows_bytes = single_rows_bytes<S>,
                      .single_rows = lora_linear_single_rows<T, TA>,
                      .backward_rows = lora_linear_backward_rows<Math>,
                      .multi_scratch_bytes = multi_bytes<Math>,
                      .multi_forward_rows = lora_linear_multi_forward_rows<Math>,
                      .multi_backward_rows = lora_linear_multi_backward_rows<Math>,
                      .reduce_a = reduce<S, TA>,
                      .reduce_b = reduce_transposed<S, TA>},
      .lora_embedding = {.scratch_bytes = lora_embedding_bytes<Math>,
                         .forward_rows = lora_embedding_forward_rows<Math, TA>,
                         .backward_rows = lora_embedding_backward_rows<Math, TA>},
      .dora_linear = {.panel_width = kPanelWidth<S>,
                      .scratch_bytes = dora_linear_bytes<S>,
                      .count = count_dropped,
                      .list = list_dropped<T>,
                      .forward = dora_linear_forward<T>,
                      .backward = dora_linear_backward<T>},
      .column_scale = {.forward_rows = column_scale_rows<T>,
                       .backward_rows = column_scale_backward_rows<T>},
      .dropout = {.rows = dropout_rows<T>, .mask_rows = dropout_mask_rows},
      .gated = gated_kernels<T>(),
      .merge = {.scratch_bytes = merge_bytes<S>, .rows = merge_rows<T, TA>},
      .quantized = {.dequantize = dequantize<T, T>,
                    .dequantize_wide = dequantize<T, S>,
                    .few_rows_bytes = few_rows_bytes<T>,
                    .pack_few_rows = pack_few_rows<T>,
                    .few_rows = few_rows<T>},
      .weight_norm = {.scratch_bytes = weight_norm_bytes<S>, .rows = weight_norm_rows<T, TA>},
  };
}

}  // namespace

// In the order of DtypePair.
extern const CpuKernels kKernels[kDtypePairs];
const CpuKernels kKernels[kDtypePairs] = {
    kernels_for<double, double>(),  kernels_for<float, float>(), kernels_for<BFloat16, BFloat16>(),
    kernels_for<BFloat16, float>(), kernels_for<Half, Half>(),   kernels_for<Half, float>()};

}  // namespace lora_ext::LORA_EXT_ISA
