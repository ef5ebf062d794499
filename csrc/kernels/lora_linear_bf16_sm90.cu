// The instantiations for a bf16 base, for sm_90a alone.
#include "launch_sm90.h"

namespace lora_ext::sm90 {

template void forward(const ForwardCall<Bf16, Bf16>&, const Allocator&, Stream);
template void forward(const ForwardCall<Bf16, float>&, const Allocator&, Stream);
template void backward(const BackwardCall<Bf16, Bf16>&, const Allocator&, Stream);
template void backward(const BackwardCall<Bf16, float>&, const Allocator&, Stream);

}  // namespace lora_ext::sm90
