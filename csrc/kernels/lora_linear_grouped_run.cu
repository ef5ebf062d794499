// Rows with adapters of their own, compiled once for each type of the base (LORA_EXT_BASE).
#include "lora_linear_grouped_run.h"

namespace lora_ext {

using Base = LORA_EXT_BASE;
template void run_grouped_forward(const GroupedForwardCall<Base>&, const Allocator&, Stream);
template void run_grouped_backward(const GroupedBackwardCall<Base>&, const Allocator&, Stream);

}  // namespace lora_ext
