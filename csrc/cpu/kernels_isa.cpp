// Compiled once per instruction set, in the namespace LORA_EXT_ISA (see CMakeLists.txt).
#include "kernels.h"
#include "simd/column_scale_rows.h"
#include "simd/dora_linear_rows.h"
#include "simd/float_math.h"
#include "simd/lora_embedding_rows.h"
#include "simd/lora_linear_rows.h"
#include "simd/merge_rows.h"
#include "simd/transpose.h"
#include "simd/weight_norm_rows.h"

namespace lora_ext::LORA_EXT_ISA {
namespace {

template <class T, class TA>
constexpr LoraLinearKernels lora_linear_kernels() {
  using Math = FloatMath<T, TA>;
  using S = typename Math::Sum;
  return {.scratch_bytes = Panel<Math>::bytes,
          .packed_bytes = transposed_bytes<S>,
          .pack = transpose<S, TA>,
          .forward_rows = forward_rows<Math>,
          .backward_rows = backward_rows<Math>,
          .reduce_a = reduce<S, TA>,
          .reduce_b = reduce_transposed<S, TA>};
}

template <class T, class TA>
constexpr MergeKernels merge_kernels() {
  return {merge_bytes<compute_t<T>>, merge_rows<T, TA>, norm_bytes<compute_t<T>>, norm_rows<T, TA>};
}

template <class T>
constexpr ElementwiseKernels elementwise_kernels() {
  return {column_scale_rows<T>, column_scale_backward_rows<T>, dropout_rows<T>};
}

template <class T>
constexpr DroppedKernels dropped_kernels() {
  using S = compute_t<T>;
  return {kPanelWidth<S>,  dropped_bytes<S>,   count_dropped,
          list_dropped<T>, dropped_forward<T>, dropped_backward<T>};
}

template <class T, class TA>
constexpr LoraEmbeddingKernels lora_embedding_kernels() {
  using Math = FloatMath<T, TA>;
  return {embedding_bytes<Math>, embedding_forward_rows<Math, TA>,
          embedding_backward_rows<Math, TA>};
}

void dropout_mask_rows(DropoutRng rng, uint32_t threshold, int64_t columns, int64_t begin,
                       int64_t end, uint8_t* keep) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < columns; column += kDropoutBlock) {
      uint16_t words[kDropoutSlots];
      fill_keep_block(rng, row, column / kDropoutBlock, threshold, words);
      const int64_t width = at_most(columns - column, kDropoutBlock);
      for (int64_t j = 0; j < width; ++j) {
        keep[(row - begin) * columns + column + j] = words[j / 16] >> (j % 16) & 1u;
      }
    }
  }
}

}  // namespace

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    {lora_linear_kernels<double, double>(), lora_linear_kernels<float, float>(),
     lora_linear_kernels<BFloat16, BFloat16>(), lora_linear_kernels<BFloat16, float>(),
     lora_linear_kernels<Half, Half>(), lora_linear_kernels<Half, float>()},
    {merge_kernels<double, double>(), merge_kernels<float, float>(),
     merge_kernels<BFloat16, BFloat16>(), merge_kernels<BFloat16, float>(),
     merge_kernels<Half, Half>(), merge_kernels<Half, float>()},
    {elementwise_kernels<double>(), elementwise_kernels<float>(), elementwise_kernels<BFloat16>(),
     elementwise_kernels<BFloat16>(), elementwise_kernels<Half>(), elementwise_kernels<Half>()},
    {dropped_kernels<double>(), dropped_kernels<float>(), dropped_kernels<BFloat16>(),
     dropped_kernels<BFloat16>(), dropped_kernels<Half>(), dropped_kernels<Half>()},
    {lora_embedding_kernels<double, double>(), lora_embedding_kernels<float, float>(),
     lora_embedding_kernels<BFloat16, BFloat16>(), lora_embedding_kernels<BFloat16, float>(),
     lora_embedding_kernels<Half, Half>(), lora_embedding_kernels<Half, float>()},
    dropout_mask_rows};

}  // namespace lora_ext::LORA_EXT_ISA
