// bench_kernels on the CPU, by the emulator of tests/simt: tests/test_gpu_programs.py runs it.
#define LORA_EXT_SM90
#include <cuda_runtime.h>

#include "kernels/launch_low_rank_sm80.h"
#include "kernels/launch_low_rank_sm90.h"
#include "kernels/launch_product_sm80.h"
#include "kernels/launch_product_sm90.h"
//
#include "kernels/column_scale.cu"
#include "kernels/lora_embedding.cu"
#include "kernels/sum_parts.cu"
#include "kernels/weight_norm.cu"
//
#include "../../../benchmarks/kernels/bench_kernels.cu"
