// The instantiations that the CUDA backend calls, one per pair of base and adapter type.
#include "launch_sm80.h"

namespace lora_ext::sm80 {

template void forward(const ForwardCall<Bf16, Bf16>&, const Allocator&, arch::Stream);
template void forward(const ForwardCall<Bf16, float>&, const Allocator&, arch::Stream);
template void forward(const ForwardCall<Fp16, Fp16>&, const Allocator&, arch::Stream);
template void forward(const ForwardCall<Fp16, float>&, const Allocator&, arch::Stream);
template void backward(const BackwardCall<Bf16, Bf16>&, const Allocator&, arch::Stream);
template void backward(const BackwardCall<Bf16, float>&, const Allocator&, arch::Stream);
template void backward(const BackwardCall<Fp16, Fp16>&, const Allocator&, arch::Stream);
template void backward(const BackwardCall<Fp16, float>&, const Allocator&, arch::Stream);

}  // namespace lora_ext::sm80
