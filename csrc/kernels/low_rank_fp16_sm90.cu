// The low-rank passes for a fp16 base, for sm_90a alone.
#include "launch_low_rank_sm90.h"

namespace lora_ext::sm90 {

template Parts down(const Matrix<Fp16>&, const Split<Fp16>&, const Dropout&, const Allocator&,
                    Stream);
template UpGradParts up_grad(const UpGrad<Fp16>&, const Allocator&, Stream);
template Parts down_grad(const Matrix<Fp16>&, const Split<Fp16>&, const Dropout&, const Allocator&,
                         Stream);

}  // namespace lora_ext::sm90
