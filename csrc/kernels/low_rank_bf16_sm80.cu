// The low-rank passes for a bf16 base; a file of their own for the time they take to compile.
#include "launch_sm80.h"

namespace lora_ext::sm80 {

template Parts down(const Matrix<Bf16>&, const Split<Bf16>&, const Dropout&, const Allocator&,
                    Stream);
template UpGradParts up_grad(const UpGrad<Bf16>&, const Allocator&, Stream);
template Parts down_grad(const Matrix<Bf16>&, const Split<Bf16>&, const Dropout&, const Allocator&,
                         Stream);

}  // namespace lora_ext::sm80
