// The instantiations for a bf16 base; a file of their own for the time they take to compile.
#include "forward_backward.h"

namespace lora_ext {

template void run_forward(const ForwardCall<Bf16, Bf16>&, const Allocator&, Stream, KernelFamily);
template void run_forward(const ForwardCall<Bf16, float>&, const Allocator&, Stream, KernelFamily);
template void run_backward(const BackwardCall<Bf16, Bf16>&, const Allocator&, Stream, KernelFamily);
template void run_backward(const BackwardCall<Bf16, float>&, const Allocator&, Stream,
                           KernelFamily);

}  // namespace lora_ext
