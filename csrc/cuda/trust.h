// Whether the kernels of a family are trusted on a GPU: before their first use there they run on
// problems whose results are known (kernels/self_check.h). One that is wrong, or cannot be
// launched, is not used again in this process, and a warning says so. What was found right is
// remembered (trust_file.h) for GPUs of this name with this driver and build.
#pragma once

#include "cuda/lora_linear_path.h"

namespace lora_ext {

// The path of a call on the current device. Checks before the first one that needs the kernels,
// some milliseconds, unless a CUDA graph is being captured, which the check would break off: such a
// call trusts, and a later one checks.
CudaPath trusted_path(const CudaCall& call);

// Whether the kernels of a family may be used on the current device: checks as trusted_path does.
bool is_trusted(KernelFamily family);

// Whether a check on this device has found something wrong. Checks nothing.
bool found_wrong(KernelFamily family, int device);

}  // namespace lora_ext
