// Compiled once per instruction set, with LORA_EXT_ISA and LORA_EXT_ISA_NAME naming it (see
// CMakeLists.txt).
#include "kernels.h"
#include "simd/lora_linear_rows.h"

namespace lora_ext::LORA_EXT_ISA {
namespace {

template <class T, class TA>
constexpr LoraLinearKernels lora_linear_kernels() {
  return {Panel<compute_t<T>>::bytes, forward_rows<T, TA>, backward_rows<T, TA>,
          transpose_b<T, TA>,         reduce<T, TA>,       merge_rows<T, TA>};
}

void dropout_mask_rows(DropoutRng rng, uint32_t threshold, int64_t columns, int64_t begin,
                       int64_t end, uint8_t* keep) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < columns; column += kDropoutBlock) {
      uint16_t words[kDropoutSlots];
      fill_keep_block(rng, row, column / kDropoutBlock, threshold, words);
      const int64_t width = at_most(columns - column, kDropoutBlock);
      for (int64_t j = 0; j < width; ++j) {
        keep[row * columns + column + j] = words[j / 16] >> (j % 16) & 1u;
      }
    }
  }
}

}  // namespace

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    LORA_EXT_ISA_NAME,
    {lora_linear_kernels<double, double>(), lora_linear_kernels<float, float>(),
     lora_linear_kernels<BFloat16, BFloat16>(), lora_linear_kernels<BFloat16, float>(),
     lora_linear_kernels<Half, Half>(), lora_linear_kernels<Half, float>()},
    dropout_mask_rows};

}  // namespace lora_ext::LORA_EXT_ISA
