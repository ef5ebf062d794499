// The product's kernels for a fp16 base; a file of their own for the time they take to compile.
#include "launch_sm80.h"

namespace lora_ext::sm80 {

template void product(const Product<Fp16>&, BLayout, Stream);

}  // namespace lora_ext::sm80
