// The machine of csrc/kernels/arch/arch.h on a CPU: what a host compiler sees of it.
#pragma once

#include "simt/any_gpu.h"
#include "simt/builtins.h"
#include "simt/runtime.h"
#include "simt/sm80.h"
#include "simt/sm90.h"

#define LORA_EXT_DYNAMIC_SHARED(name) uint8_t* const name = ::simt::block().shared.data()
