// The product for a fp16 base, for sm_90a alone.
#include "launch_sm90.h"

namespace lora_ext::sm90 {

template void product(const Product<Fp16>&, BLayout, Stream);

}  // namespace lora_ext::sm90
