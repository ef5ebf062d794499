// The instantiations for a bf16 base; a file of their own for the time they take to compile.
#include "launch_sm80.h"

namespace lora_ext::sm80 {

extern template void product(const Product<Bf16>&, BLayout, Stream);  // product_bf16_sm80.cu

template void forward(const ForwardCall<Bf16, Bf16>&, const Allocator&, Stream);
template void backward(const BackwardCall<Bf16, Bf16>&, const Allocator&, Stream);
template void forward_with(const ForwardCall<Bf16, Bf16>&, const Allocator&, Stream,
                           ProductLauncher<Bf16>);
template void backward_with(const BackwardCall<Bf16, Bf16>&, const Allocator&, Stream,
                            ProductLauncher<Bf16>);
template void forward(const ForwardCall<Bf16, float>&, const Allocator&, Stream);
template void backward(const BackwardCall<Bf16, float>&, const Allocator&, Stream);
template void forward_with(const ForwardCall<Bf16, float>&, const Allocator&, Stream,
                           ProductLauncher<Bf16>);
template void backward_with(const BackwardCall<Bf16, float>&, const Allocator&, Stream,
                            ProductLauncher<Bf16>);

}  // namespace lora_ext::sm80
