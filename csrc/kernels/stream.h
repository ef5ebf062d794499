// A stream of CUDA, without its headers.
#pragma once

struct CUstream_st;

namespace lora_ext {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace lora_ext
