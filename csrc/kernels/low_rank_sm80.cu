// The low-rank passes of the sm_80 family, compiled once for each type of the base (LORA_EXT_BASE).
#include "launch_low_rank_sm80.h"

namespace lora_ext::sm80 {

using Base = LORA_EXT_BASE;
template void launch_down(const Matrix<Base>&, const Split<Base>&, const Dropout&,
                          const Hidden<Base>&, const Allocator&, Stream);
template void launch_up_grad(const UpGrad<Base>&, Gradients<Base>&, const Allocator&, Stream);
template void launch_down_grad(const Matrix<Base>&, const Split<Base>&, const Dropout&,
                               const KeptBits&, const Gradient<Base>&, Gradients<Base>&,
                               const Allocator&, Stream);

}  // namespace lora_ext::sm80
