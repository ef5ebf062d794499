// Whether the kernels of a family are trusted on a GPU: before their first use there they run on
// problems whose results are known (kernels/self_check.h). One that is wrong, or cannot be
// launched, is not used again in this process, and a warning says so.
#pragma once

#include "kernels/family.h"

namespace lora_ext {

// Of the current device. Checks at the first call, some milliseconds, unless a CUDA graph is being
// captured, which the check would break off: such a call trusts, and a later one checks.
bool trusted(KernelFamily family);

// Whether a check on this device has found something wrong. Checks nothing.
bool found_wrong(KernelFamily family, int device);

}  // namespace lora_ext
