// Kernels of the tests that use what sm_90 adds: a product by TMA, mbarriers and wgmma as the
// project's kernels do it, one warpgroup that loads and one that multiplies.
#pragma once

#include "kernels/arch/arch.h"

namespace simt_test {

using namespace lora_ext;
using arch::Major, arch::Swizzle;

// What a test breaks on purpose.
enum class Mistake { kNone, kWrongBytes, kReleasedEarly, kNoWaitForFull, kNoWaitForEmpty };

template <class T>
struct ProductParams {
  arch::TensorMap a, b;
  float* out;  // [M, N]
  int M, N, K;
};

// out = a b; a [M, K] lies K-major, b [N, K] K-major or [K, N] MN-major.
template <class T, int kN, Major kMajorB, Mistake kMistake = Mistake::kNone>
struct Product {
  static constexpr int kM = 64, kK = 64, kStages = 3, kThreads = 256;
  static constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16);

  // MN-major: boxes of 64 columns, one after the other.
  static constexpr int kBoxRows = kMajorB == Major::kK ? kN : kK, kBoxColumns = 64;
  static constexpr int kBoxes = kMajorB == Major::kK ? 1 : kN / 64;

  LORA_EXT_DEVICE static void load(const ProductParams<T>& params, uint32_t stage, uint32_t full,
                                   int k, int m, int n) {
    constexpr int kMissing = kMistake == Mistake::kWrongBytes ? 128 : 0;
    arch::mbarrier_arrive_expect_tx(full, kStageBytes - kMissing);
    arch::tma_load_2d(stage, params.a, full, k, m);
    for (int box = 0; box < kBoxes; ++box) {
      const uint32_t shared = stage + kABytes + static_cast<uint32_t>(box) * kBoxRows * 128;
      if (kMajorB == Major::kK) {
        arch::tma_load_2d(shared, params.b, full, k, n);
      } else {
        arch::tma_load_2d(shared, params.b, full, n + box * 64, k);
      }
    }
  }

  LORA_EXT_DEVICE static void multiply(float (&sums)[kN / 2], uint32_t stage) {
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      const uint32_t a = stage + static_cast<uint32_t>(k) * 32;
      const uint32_t b =
          stage + kABytes + static_cast<uint32_t>(k) * (kMajorB == Major::kK ? 32 : 16 * 128);
      arch::wgmma<T, kN, Major::kK, kMajorB>(
          sums, arch::wgmma_descriptor(a, 16, 1024, Swizzle::k128),
          arch::wgmma_descriptor(b, kBoxRows * 128, 1024, Swizzle::k128), true);
    }
    arch::wgmma_commit();
  }
};

template <class T, int kN, Major kMajorB, Mistake kMistake>
__global__ void __launch_bounds__(256, 1)
    product_kernel(const __grid_constant__ ProductParams<T> params) {
#if defined(LORA_EXT_SM90A)
  using P = Product<T, kN, kMajorB, kMistake>;
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int m = static_cast<int>(blockIdx.y) * P::kM, n = static_cast<int>(blockIdx.x) * kN;
  const uint32_t stages = arch::shared_address(shared);
  const uint32_t barriers = stages + P::kStages * P::kStageBytes;
  const auto full = [&](int slot) { return barriers + static_cast<uint32_t>(slot) * 16; };
  const auto empty = [&](int slot) { return full(slot) + 8; };
  const auto stage = [&](int slot) {
    return stages + static_cast<uint32_t>(slot) * P::kStageBytes;
  };
  if (thread == 0) {
    for (int slot = 0; slot < P::kStages; ++slot) {
      arch::mbarrier_init(full(slot), 1);
      arch::mbarrier_init(empty(slot), 1);
    }
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  const int steps = (params.K + P::kK - 1) / P::kK;
  if (thread < 128) {
    arch::register_decrease<40>();
    if (thread != 0) return;
    for (int step = 0; step < steps; ++step) {
      const int slot = step % P::kStages, turn = step / P::kStages;
      if (kMistake != Mistake::kNoWaitForEmpty) arch::mbarrier_wait(empty(slot), (turn + 1) % 2);
      P::load(params, stage(slot), full(slot), step * P::kK, m, n);
    }
    return;
  }
  arch::register_increase<232>();
  float sums[kN / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int slot = step % P::kStages, turn = step / P::kStages;
    if (kMistake != Mistake::kNoWaitForFull) arch::mbarrier_wait(full(slot), turn % 2);
    P::multiply(sums, stage(slot));
    if (kMistake == Mistake::kReleasedEarly && thread == 128) arch::mbarrier_arrive(empty(slot));
    arch::wgmma_wait<0>();
    arch::barrier_sync(1, 128);
    if (kMistake != Mistake::kReleasedEarly && thread == 128) arch::mbarrier_arrive(empty(slot));
  }
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int t = thread - 128;
    const int row = m + t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    const int column = n + i / 4 * 8 + t % 4 * 2 + i % 2;
    if (row < params.M && column < params.N) params.out[row * params.N + column] = sums[i];
  }
#endif
}

}  // namespace simt_test
