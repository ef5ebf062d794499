// Bytes of the host into memory of the device as arguments of kernels, for any GPU: nothing waits
// for a copy engine, nor keeps the host's memory; and a CUDA graph has them by itself, where a copy
// would read the host's memory again in each replay. No CUDA headers.
#pragma once

#include <cstdint>

#include "stream.h"

namespace lora_ext {

// `bytes`: a multiple of 16, as `to` is.
void write_table(void* to, const void* from, int64_t bytes, Stream stream);

}  // namespace lora_ext
