// Scratch of many sizes, cut out of few blocks: each block is a call of the device's allocator,
// which costs the host as long as a part of a launch. Host code without CUDA's headers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace lora_ext {

class ScratchBlocks {
 public:
  static constexpr int64_t kBlock = 1 << 20;   // what torch's allocator takes out of its small pool
  static constexpr int64_t kAlignment = 256;   // of what torch allocates itself, or better
  static constexpr int64_t kOwn = kBlock / 4;  // larger ones have a block of their own

  // So many bytes that nobody else has. allocate(bytes) makes a block, aligned at least as well,
  // that lives as long as all that is cut from it.
  template <class Allocate>
  void* take(int64_t bytes, const Allocate& allocate) {
    bytes = std::max<int64_t>((bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
    if (bytes > kOwn) return allocate(bytes);
    if (bytes > left_) {
      next_ = static_cast<std::byte*>(allocate(kBlock));
      left_ = kBlock;
    }
    std::byte* const found = next_;
    next_ += bytes, left_ -= bytes;
    return found;
  }

 private:
  std::byte* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace lora_ext
