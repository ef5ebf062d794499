// The instantiations for a fp16 base, for sm_90a alone.
#include "launch_sm90.h"

namespace lora_ext::sm90 {

template void forward(const ForwardCall<Fp16, Fp16>&, const Allocator&, Stream);
template void forward(const ForwardCall<Fp16, float>&, const Allocator&, Stream);
template void backward(const BackwardCall<Fp16, Fp16>&, const Allocator&, Stream);
template void backward(const BackwardCall<Fp16, float>&, const Allocator&, Stream);

}  // namespace lora_ext::sm90
