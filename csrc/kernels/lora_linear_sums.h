// What becomes of the sums of the low-rank passes, by whichever kernel adds the last parts of them:
// the results are the same bit for bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "element.h"

namespace lora_ext {

// What h and dh are multiplied by, the same for all of their elements: a number of the call, times
// one that only the device knows, so that nobody waits for it. Kernels read it here alone.
struct HiddenFactor {
  float value;
  const float* factor;  // or null

  LORA_EXT_DEVICE float get() const { return factor ? value * *factor : value; }
};

// a * b, rounded: a compiler that adds to the exact product makes another result of the same sums.
LORA_EXT_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Whether what is rounded to T is multiplied by a power of two before (fp16_range.h).
template <class T>
constexpr bool kScaled = std::is_same_v<T, Fp16>;

// What rounding to `near` left of it; of infinity nothing is left.
template <class T>
LORA_EXT_DEVICE float left_of(float full, T near) {
  const float left = full - to_float(near);
  return left == left ? left : 0.0f;
}

template <class T>
struct alignas(4) PairOf {
  T first, second;
};

// h or dh: in float, and as an operand of the passes that read it.
template <class T>
struct Hidden {
  int64_t M;
  int r, padded;   // padded: r rounded up to a multiple of 16
  int copies;      // of the operand, beside each other
  int64_t stride;  // of the operand's rows, an even number
  float survivor;  // dropout's 1 / (1 - p)
  HiddenFactor scaling;
  float* sums;   // [M, r]: survivor * sum; or null
  T* value;      // [M, copies * padded]: scaling * sums rounded, zero beyond r; or null
  T* remainder;  // the same: what that rounding left; or null
  const float* back = nullptr;  // of fp16: multiplies the sums before anything else; or null

  LORA_EXT_DEVICE float kept(float sum, int column) const {
    if constexpr (kScaled<T>) {
      if (back) sum = rounded_product(sum, *back);
    }
    return column < r ? rounded_product(survivor, sum) : 0.0f;
  }

  // `factor`: scaling.get(); the column is less than `padded`.
  LORA_EXT_DEVICE void store(float sum, float factor, int64_t row, int column) const {
    const float own = kept(sum, column);
    if (sums && column < r) sums[row * r + column] = own;
    if (!value) return;
    const float full = rounded_product(factor, own);
    const T near = rounded<T>(full);
    for (int64_t copy = 0; copy < copies; ++copy) {
      const int64_t at = row * stride + copy * padded + column;
      value[at] = near;
      if (remainder) remainder[at] = rounded<T>(left_of(full, near));
    }
  }

  // Of two neighbours, the first in an even column.
  LORA_EXT_DEVICE void store_pair(float first, float second, float factor, int64_t row,
                                  int column) const {
    const float own[2] = {kept(first, column), kept(second, column + 1)};
    if (sums) {
      if (column < r) sums[row * r + column] = own[0];
      if (column + 1 < r) sums[row * r + column + 1] = own[1];
    }
    if (!value) return;
    const float full[2] = {rounded_product(factor, own[0]), rounded_product(factor, own[1])};
    const PairOf<T> near{rounded<T>(full[0]), rounded<T>(full[1])};
    const PairOf<T> left{rounded<T>(left_of(full[0], near.first)),
                         rounded<T>(left_of(full[1], near.second))};
    for (int64_t copy = 0; copy < copies; ++copy) {
      const int64_t at = row * stride + copy * padded + column;
      *reinterpret_cast<PairOf<T>*>(value + at) = near;
      if (remainder) *reinterpret_cast<PairOf<T>*>(remainder + at) = left;
    }
  }
};

// dA or dB, of the type of the adapters.
template <class T>
struct Gradient {
  HiddenFactor scale;
  T* rounded;                   // scale * sum; or null:
  float* full;                  // the same in float
  const float* back = nullptr;  // of fp16: multiplies the scale; or null

  LORA_EXT_DEVICE float factor() const {
    if constexpr (kScaled<T>) {
      if (back) return scale.get() * *back;
    }
    return scale.get();
  }
  LORA_EXT_DEVICE void store(float sum, float factor, int64_t at) const {
    if (full) {
      full[at] = factor * sum;
    } else {
      rounded[at] = lora_ext::rounded<T>(factor * sum);
    }
  }
  Gradient from(int64_t first) const {
    return {scale, rounded ? rounded + first : nullptr, full ? full + first : nullptr, back};
  }
};

}  // namespace lora_ext
