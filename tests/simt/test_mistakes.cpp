// Mistakes that kernels make, planted here: each has to be caught, and its right version not.

#include "check.h"

namespace {

using namespace lora_ext;
using namespace simt_test;

struct Params {
  const float* in;
  float* out;
};

// Runs a kernel of 64 threads on the numbers from 0 to 63.
std::vector<float> run(void (*kernel)(Params), int shared_bytes, size_t outputs = 64) {
  alignas(16) static const std::vector<float> in = [] {
    std::vector<float> numbers(64);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i);
    return numbers;
  }();
  std::vector<float> out(outputs, kNan);
  arch::launch(kernel, 1, 64, shared_bytes, nullptr, Params{in.data(), out.data()});
  return out;
}

bool reversed(const std::vector<float>& out) {
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != static_cast<float>(out.size() - 1 - i)) return false;
  }
  return true;
}

// ---- Waiting for other threads -----------------------------------------------------------------

// Reverses the numbers through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = params.in[threadIdx.x];
  if (kBarrier) __syncthreads();
  params.out[threadIdx.x] = values[63 - threadIdx.x];
}

CASE(missing_syncthreads) {
  EXPECT(schedules_that_catch([] { return reversed(run(reverse_kernel<true>, 256)); }) == 0);
  EXPECT(schedules_that_catch([] { return reversed(run(reverse_kernel<false>, 256)); }) > 0);
}

// The same within warps, whose lanes need a barrier too.
template <bool kBarrier>
__global__ void reverse_warp_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = params.in[threadIdx.x];
  if (kBarrier) __syncwarp();
  params.out[63 - threadIdx.x] = values[threadIdx.x ^ 31] - 31.0f + 2 * (threadIdx.x % 32);
}

CASE(missing_syncwarp) {
  EXPECT(schedules_that_catch([] { return reversed(run(reverse_warp_kernel<true>, 256)); }) == 0);
  EXPECT(schedules_that_catch([] { return reversed(run(reverse_warp_kernel<false>, 256)); }) > 0);
}

// Two rounds through the same memory: the second may begin when all have read the first.
template <bool kBarrier>
__global__ void reuse_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  float value = params.in[threadIdx.x];
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[63 - threadIdx.x];
    if (kBarrier) __syncthreads();
  }
  params.out[threadIdx.x] = value;
}

CASE(shared_memory_reused_too_early) {
  EXPECT(schedules_that_catch([] { return reversed(run(reuse_kernel<true>, 256)); }) == 0);
  EXPECT(schedules_that_catch([] { return reversed(run(reuse_kernel<false>, 256)); }) > 0);
}

__global__ void skipped_barrier_kernel(Params) {
  if (threadIdx.x < 32) __syncthreads();
}

CASE(barrier_that_some_threads_skip) {
  expect_error(
      [] { run(skipped_barrier_kernel, 0); },
      {"block (0, 0, 0): deadlock", "threads 0-31 wait in __syncthreads", "threads 32-63 ended"});
}

// ---- Operations of a whole warp ----------------------------------------------------------------

__global__ void half_a_warp_kernel(Params) {
  uint32_t out[4];
  LORA_EXT_DYNAMIC_SHARED(shared);
  if (threadIdx.x % 32 < 16) arch::ldmatrix_x4<false>(out, arch::shared_address(shared));
}

CASE(warp_operation_of_half_a_warp) {
  expect_error([] { run(half_a_warp_kernel, 16); },
               {"deadlock", "threads 0-15 wait in ldmatrix.x4", "threads 16-31 ended"});
}

__global__ void diverged_kernel(Params params) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    params.out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, params.in[threadIdx.x], 1);
  }
}

CASE(lanes_at_different_operations) {
  expect_error([] { run(diverged_kernel, 0); },
               {"warp 0, lane 16", "__shfl_xor_sync meets __syncwarp", "diverged"});
}

__global__ void wrong_mask_kernel(Params params) {
  const bool low = threadIdx.x % 32 < 16;
  params.out[threadIdx.x] = __shfl_sync(low ? 0xFFFFu : 0xFFFF0000u, params.in[threadIdx.x], 20);
}

CASE(shuffle_from_outside_of_the_mask) {
  expect_error([] { run(wrong_mask_kernel, 0); }, {"reads a lane that takes no part"});
}

// ---- cp.async ----------------------------------------------------------------------------------

// Two copies into two slots, each read when it should have arrived.
template <int kUnfinished>
__global__ void two_copies_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const auto* values = reinterpret_cast<const float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int slot = 0; slot < 2; ++slot) {
    if (thread < 8) {
      const int first = slot * 32 + thread * 4;
      arch::cp_async_16(arch::shared_address(values + first), params.in + first, 16);
    }
    arch::cp_async_commit();
  }
  arch::cp_async_wait<1>();
  __syncthreads();
  if (thread < 32) params.out[63 - thread] = values[thread];
  arch::cp_async_wait<kUnfinished>();
  __syncthreads();
  if (thread >= 32) params.out[63 - thread] = values[thread];
  arch::cp_async_wait<0>();
}

CASE(missing_cp_async_wait) {
  EXPECT(schedules_that_catch([] { return reversed(run(two_copies_kernel<0>, 256)); }) == 0);
  EXPECT(schedules_that_catch([] { return reversed(run(two_copies_kernel<1>, 256)); }) > 0);
}

// Copies of one warp into what the other one may still be reading.
template <bool kBarrier>
__global__ void slot_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const auto* values = reinterpret_cast<const float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = 1; half >= 0; --half) {
    if (thread < 8) {
      arch::cp_async_16(arch::shared_address(shared) + static_cast<uint32_t>(thread) * 16,
                        params.in + half * 32 + thread * 4, 16);
    }
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
    __syncthreads();
    if (thread >= 32) params.out[(1 - half) * 32 + thread - 32] = values[63 - thread];
    if (kBarrier) __syncthreads();
  }
}

CASE(copy_into_a_slot_that_is_still_read) {
  EXPECT(schedules_that_catch([] { return reversed(run(slot_kernel<true>, 128)); }) == 0);
  EXPECT(schedules_that_catch([] { return reversed(run(slot_kernel<false>, 128)); }) > 0);
}

__global__ void unfinished_copy_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::cp_async_16(arch::shared_address(shared), params.in, 16);
}

CASE(copy_that_nobody_waits_for) {
  expect_error([] { run(unfinished_copy_kernel, 16); }, {"without having waited for its cp.async"});
}

__global__ void misaligned_copy_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::cp_async_16(arch::shared_address(shared), params.in + 1, 16);
}

CASE(copy_from_an_odd_address) {
  expect_error([] { run(misaligned_copy_kernel, 16); }, {"thread 0", "no multiple of 16"});
}

// ---- Outside of shared memory ------------------------------------------------------------------

__global__ void ldmatrix_outside_kernel(Params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  uint32_t out[4];
  arch::ldmatrix_x4<false>(out, arch::shared_address(shared) + threadIdx.x * 16);
}

CASE(instruction_outside_of_shared_memory) {
  expect_error([] { run(ldmatrix_outside_kernel, 63 * 16); },
               {"warp 1", "ldmatrix: outside of shared memory"});
}

__global__ void read_outside_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = params.in[threadIdx.x];
  __syncthreads();
  params.out[62 - threadIdx.x + 1] = values[threadIdx.x + 1] - 1;
}

__global__ void write_outside_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = params.in[threadIdx.x];
}

#if SIMT_ASAN
// AddressSanitizer ends the program.
CASE_ALONE(read_outside) { run(read_outside_kernel, 256); }
CASE_ALONE(write_outside) { run(write_outside_kernel, 256); }
#else
CASE(read_outside) { EXPECT(std::isnan(run(read_outside_kernel, 256)[0])); }
CASE(write_outside) {
  expect_error([] { run(write_outside_kernel, 256); }, {"a store outside of shared memory"});
}
#endif

// ---- Launches ----------------------------------------------------------------------------------

// ---- Kernels that overlap ----------------------------------------------------------------------

enum class Dependence { kWaits, kOneDoesNot, kCopiesBefore };

template <Dependence kDependence>
__global__ void dependent_kernel(Params params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const auto copy = [&] {
    if (thread == 0) arch::cp_async_16(arch::shared_address(shared), params.in, 16);
  };
  if (kDependence == Dependence::kCopiesBefore) copy();
  if (kDependence != Dependence::kOneDoesNot || thread != 5) arch::wait_for_previous_kernel();
  if (kDependence != Dependence::kCopiesBefore) copy();
  arch::let_next_kernel_start();
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
}

template <Dependence kDependence>
void run_dependent() {
  alignas(16) const float in[4] = {};
  arch::launch_dependent(dependent_kernel<kDependence>, 1, 64, 16, nullptr, Params{in, nullptr});
}

CASE(dependent_launch_that_does_not_wait) {
  run_dependent<Dependence::kWaits>();
  expect_error(run_dependent<Dependence::kOneDoesNot>,
               {"thread 5", "it ends without wait_for_previous_kernel, in a dependent launch"});
  expect_error(run_dependent<Dependence::kCopiesBefore>,
               {"thread 0", "cp.async without wait_for_previous_kernel"});
  // Any other launch comes after all that was launched before.
  alignas(16) const float in[4] = {};
  arch::launch(dependent_kernel<Dependence::kOneDoesNot>, 1, 64, 16, nullptr, Params{in, nullptr});
}

// ---- Limits of a launch ------------------------------------------------------------------------

std::string refusal(dim3 grid, int threads, int shared_bytes) {
  return error_of(
      [&] { arch::launch(reverse_kernel<true>, grid, threads, shared_bytes, nullptr, Params{}); });
}

CASE(launches_that_no_gpu_takes) {
  simt::options().limits_only = true;
  const std::string configuration = "invalid configuration argument";
  for (const dim3 grid : {dim3(1u << 31), dim3(1, 65536), dim3(1, 1, 65536), dim3(0), dim3(1, 0)}) {
    EXPECT(refusal(grid, 64, 0).find(configuration) != std::string::npos);
  }
  EXPECT(refusal(dim3((1u << 31) - 1, 65535, 65535), 64, 0) == "no error");
  EXPECT(refusal(dim3(1), 1025, 0).find(configuration) != std::string::npos);
  EXPECT(refusal(dim3(1), 1024, 0) == "no error");
}

CASE(shared_memory_of_each_gpu) {
  simt::options().limits_only = true;
  constexpr int kLimits[][2] = {{70, 96}, {75, 64},  {80, 163},  {86, 99},   {87, 163},
                                {89, 99}, {90, 227}, {100, 227}, {110, 227}, {120, 99}};
  for (const auto& [capability, most] : kLimits) {
    simt::options().compute_capability = capability;
    EXPECT(arch::most_shared_bytes() == most * 1024);
    EXPECT(refusal(dim3(1), 64, most * 1024) == "no error");
    EXPECT(refusal(dim3(1), 64, most * 1024 + 1) ==
           "lora_ext: a CUDA kernel was not launched, of 1 x 1 x 1 blocks of 64 threads and " +
               std::to_string(most * 1024 + 1) + " bytes of shared memory: invalid argument");
  }
}

// More than 48 KiB only to a kernel that has asked for as much.
CASE(shared_memory_that_is_not_asked_for) {
  simt::options().limits_only = true;
  cudaLaunchConfig_t config{dim3(1), dim3(32), 48 * 1024, nullptr, nullptr, 0};
  const auto launch = [&] { return cudaLaunchKernelEx(&config, reverse_kernel<false>, Params{}); };
  EXPECT(launch() == cudaSuccess);
  config.dynamicSmemBytes += 16;
  EXPECT(launch() == cudaErrorInvalidValue);
  cudaFuncSetAttribute(reverse_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       64 << 10);
  EXPECT(launch() == cudaSuccess);
  cudaGetLastError();
}

// Or the next kernel that anyone launches is told of it.
CASE(a_refused_launch_leaves_no_error) {
  EXPECT(refusal(dim3(1), 64, 228 * 1024) != "no error");
  EXPECT(cudaGetLastError() == cudaSuccess);
  EXPECT(refusal(dim3(1, 65536), 64, 0) != "no error");
  EXPECT(cudaGetLastError() == cudaSuccess);
}

}  // namespace
