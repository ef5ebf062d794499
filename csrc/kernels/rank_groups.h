// How the low-rank passes cut a rank: into groups, each for the narrowest kernel that holds it.
#pragma once

#include <cstdint>

namespace lora_ext {

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// Calls f with the smallest of the widths, up to kMost, that `columns` fits in, as a constant.
template <int kMost, int kWidth = 16, class F>
void with_width(int64_t columns, const F& f) {
  if constexpr (kWidth < kMost) {
    if (columns > kWidth) return with_width<kMost, 2 * kWidth>(columns, f);
  }
  f(Width<kWidth>{});
}

// Calls f(first, count, width) for the columns of the rank that one launch treats.
template <int kMost, class F>
void for_each_group(int64_t r, const F& f) {
  for (int64_t first = 0; first < r; first += kMost) {
    const int64_t count = r - first < kMost ? r - first : kMost;
    with_width<kMost>(count, [&](auto width) { f(first, count, width); });
  }
}

}  // namespace lora_ext
