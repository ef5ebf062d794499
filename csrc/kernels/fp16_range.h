// fp16 has few exponents: what is beyond 65504 is infinite, and below 2^-14 digits are lost. So
// what the kernels round to it is multiplied by a power of two first, which brings the largest
// value just below 2^15, and the sums that are made of it by the inverse, in float: both are exact.
// bf16 has the exponents of float, and nothing of this.
#pragma once

#include "arch/arch.h"
#include "lora_linear_sums.h"

namespace lora_ext {

// Of the largest magnitude, as the bits of a float: 1 where it is infinite or no number.
struct PowerOfTwo {
  float to, back;

  LORA_EXT_DEVICE explicit PowerOfTwo(uint32_t largest) : to(1.0f), back(1.0f) {
    constexpr int kBias = 127, kInfinite = 255, kMost = 126;
    const int exponent = static_cast<int>(largest >> 23);
    if (exponent >= kInfinite) return;
    const int up = kBias + 14 - exponent < kMost ? kBias + 14 - exponent : kMost;
    to = bits_to_float(static_cast<uint32_t>(kBias + up) << 23);
    back = bits_to_float(static_cast<uint32_t>(kBias - up) << 23);
  }
};

// What is known of a matrix of floats before it is rounded.
struct Range {
  static constexpr int kBlocks = 128;  // that measure a matrix

  uint32_t* largest = nullptr;  // [parts]: what each of them has found; null: there is no range
  int parts = 0;
  float* back = nullptr;  // for PowerOfTwo's

  // By a whole warp.
  LORA_EXT_DEVICE PowerOfTwo power() const {
    uint32_t most = 0;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < parts; i += 32) {
      most = most < largest[i] ? largest[i] : most;
    }
    return PowerOfTwo(largest_of_warp(most));
  }

  LORA_EXT_DEVICE static uint32_t largest_of_warp(uint32_t most) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, most, distance);
      most = most < other ? other : most;
    }
    return most;
  }

  LORA_EXT_DEVICE static uint32_t magnitude(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits & 0x7FFFFFFFu;
  }
};

// The largest magnitude of each block's share; of NaN the bits are larger than those of all
// numbers.
struct MeasureJob {
  static constexpr int kSharedBytes = kElementThreads / 32 * 4;
  static constexpr int kAtOnce = 8;  // reads of a thread

  const float* in;
  int64_t count;
  HiddenFactor factor;  // that multiplies all of them
  uint32_t* largest;    // [Range::kBlocks]

  LORA_EXT_DEVICE void run(int64_t i) const {
    LORA_EXT_DYNAMIC_SHARED(shared);
    auto* const of_warps = reinterpret_cast<uint32_t*>(shared);
    const int thread = static_cast<int>(threadIdx.x);
    const float by = factor.get();
    uint32_t most = 0;
    const auto take = [&](uint32_t other) { most = most < other ? other : most; };
    constexpr int64_t kApart = Range::kBlocks * kElementThreads;
    for (int64_t first = i; first < count; first += kAtOnce * kApart) {
      float values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        values[k] = first + k * kApart < count ? in[first + k * kApart] : 0.0f;
      }
#pragma unroll
      for (const float value : values) take(Range::magnitude(rounded_product(by, value)));
    }
    most = Range::largest_of_warp(most);
    if (thread % 32 == 0) of_warps[thread / 32] = most;
    __syncthreads();
    if (thread > 0) return;
    for (int warp = 1; warp < kElementThreads / 32; ++warp) take(of_warps[warp]);
    largest[i / kElementThreads] = most;
  }
};

}  // namespace lora_ext
