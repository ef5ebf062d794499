// The instantiations for a fp16 base; a file of their own for the time they take to compile.
#include "launch_sm80.h"

namespace lora_ext::sm80 {

extern template void product(const Product<Fp16>&, BLayout, Stream);  // product_fp16_sm80.cu

template void forward(const ForwardCall<Fp16, Fp16>&, const Allocator&, Stream);
template void backward(const BackwardCall<Fp16, Fp16>&, const Allocator&, Stream);
template void forward_with(const ForwardCall<Fp16, Fp16>&, const Allocator&, Stream,
                           ProductLauncher<Fp16>);
template void backward_with(const BackwardCall<Fp16, Fp16>&, const Allocator&, Stream,
                            ProductLauncher<Fp16>);
template void forward(const ForwardCall<Fp16, float>&, const Allocator&, Stream);
template void backward(const BackwardCall<Fp16, float>&, const Allocator&, Stream);
template void forward_with(const ForwardCall<Fp16, float>&, const Allocator&, Stream,
                           ProductLauncher<Fp16>);
template void backward_with(const BackwardCall<Fp16, float>&, const Allocator&, Stream,
                            ProductLauncher<Fp16>);

}  // namespace lora_ext::sm80
