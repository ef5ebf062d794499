// How the low-rank passes cut a rank: into groups of 64, each for the narrowest kernel that holds it.
#pragma once

#include <cstdint>

namespace lora_ext {

// Calls f with the smallest of the tile widths that `columns` fits in, as a constant.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};
template <class F>
void with_width(int64_t columns, const F& f) {
  if (columns <= 16) {
    f(Width<16>{});
  } else if (columns <= 32) {
    f(Width<32>{});
  } else {
    f(Width<64>{});
  }
}

// Calls f(first, width) for the columns of the rank that one launch treats, group by group.
template <class F>
void for_each_group(int64_t r, const F& f) {
  constexpr int64_t kGroup = 64;
  for (int64_t first = 0; first < r; first += kGroup) {
    const int64_t count = r - first < kGroup ? r - first : kGroup;
    with_width(count, [&](auto width) { f(first, count, width); });
  }
}

}  // namespace lora_ext
