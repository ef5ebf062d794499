// Layers of one x, compiled once for each type of the base (LORA_EXT_BASE).
#include "lora_linear_multi_run.h"

namespace lora_ext {

using Base = LORA_EXT_BASE;
template <class TA>
using Forwards = std::span<const ForwardCall<Base, TA>>;
template <class TA>
using Backwards = std::span<const BackwardCall<Base, TA>>;
template void run_multi_forward(Forwards<Base>, const Allocator&, Stream, KernelFamily);
template void run_multi_forward(Forwards<float>, const Allocator&, Stream, KernelFamily);
template void run_multi_backward(Backwards<Base>, const Allocator&, Stream, KernelFamily);
template void run_multi_backward(Backwards<float>, const Allocator&, Stream, KernelFamily);

}  // namespace lora_ext
