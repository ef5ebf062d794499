// The low-rank passes of the sm_80 family, compiled once for each type of the base (LORA_EXT_BASE).
#include "launch_low_rank_sm80.h"

namespace lora_ext::sm80 {

using Base = LORA_EXT_BASE;
template Parts launch_down(const Matrix<Base>&, const Split<Base>&, const Dropout&,
                           const Allocator&, Stream);
template UpGradParts launch_up_grad(const UpGrad<Base>&, const Allocator&, Stream);
template Parts launch_down_grad(const Matrix<Base>&, const Split<Base>&, const Dropout&,
                                const KeptBits&, const Allocator&, Stream);

}  // namespace lora_ext::sm80
