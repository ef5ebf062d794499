// Forward and backward, compiled once for each type of the base (LORA_EXT_BASE).
#include "lora_linear_run.h"

namespace lora_ext {

using Base = LORA_EXT_BASE;
template void run_forward(const ForwardCall<Base, Base>&, const Allocator&, Stream, KernelFamily);
template void run_forward(const ForwardCall<Base, float>&, const Allocator&, Stream, KernelFamily);
template void run_backward(const BackwardCall<Base, Base>&, const Allocator&, Stream, KernelFamily);
template void run_backward(const BackwardCall<Base, float>&, const Allocator&, Stream,
                           KernelFamily);
template void run_up_grad(const UpGradCall<Base, Base>&, const Allocator&, Stream, KernelFamily);
template void run_up_grad(const UpGradCall<Base, float>&, const Allocator&, Stream, KernelFamily);

}  // namespace lora_ext
