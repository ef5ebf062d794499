// Sums of parts: a block has 32 columns, and eight groups of threads add every eighth part each.
#include <cmath>

#include "elementwise.h"
#include "span.h"
#include "sum_parts.h"

namespace lora_ext {
namespace {

constexpr int kGroups = 8;

__global__ void __launch_bounds__(kGroups * 32)
    sum_parts_kernel(const __grid_constant__ SumParts params) {
  LORA_EXT_DYNAMIC_SHARED(memory);
  auto* const sums = reinterpret_cast<float*>(memory);  // [kGroups, 32]
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = thread / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const int64_t step = params.results * params.columns;
  const int result = static_cast<int>(blockIdx.y);
  const float* const first = params.parts + result * params.columns + column;
  float sum = 0.0f;
  if (column < params.columns) {
    for (int64_t part = group; part < params.count; part += kGroups) sum += first[part * step];
  }
  sums[thread] = sum;
  __syncthreads();
  float* const out = params.out[result];
  if (group > 0 || column >= params.columns || !out) return;
#pragma unroll
  for (int other = 1; other < kGroups; ++other) sum += sums[other * 32 + lane];
  out[column] = params.root ? sqrtf(sum) : sum;
}

}  // namespace

void sum_parts(const SumParts& call, Stream stream) {
  dim3 grid = flat_grid(ceil_div(call.columns, 32));
  grid.y = static_cast<unsigned>(call.results);
  arch::launch_dependent(sum_parts_kernel, grid, kGroups * 32, kGroups * 32 * int{sizeof(float)},
                         stream, call);
}

}  // namespace lora_ext
