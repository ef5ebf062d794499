// The machine that kernels are written against. Under nvcc its instructions are PTX; a host
// compiler takes them from the emulator of the tests (simt/arch.h, on its include path), which
// gives the same names bodies that run on a CPU. How kernels are launched is the same for both.
#pragma once

#include "../element.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include "any_gpu.h"
#include "ptx_sm80.h"
#include "ptx_sm90.h"

// The block's dynamic shared memory, as bytes, aligned for every instruction.
#define LORA_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

#else
#include "simt/arch.h"
#endif

#include "launch.h"
