// A block's shared memory. It starts as NaN in every floating-point format, so that what was never
// written shows in the result, and lies between guards, so that what is written beyond its ends is
// found: by AddressSanitizer at once, without it when the block ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/fiber.h"

namespace simt {

class SharedMemory {
 public:
  // Kernels align to as much; swizzled tiles need it.
  static constexpr size_t kAlignment = 1024;

  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    total_ = rounded + 2 * kGuard;
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, total_));
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, kPoison, total_);
#if SIMT_ASAN
    __asan_poison_memory_region(memory_, kGuard);
    __asan_poison_memory_region(data() + bytes, total_ - kGuard - bytes);
#endif
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
#if SIMT_ASAN
    __asan_unpoison_memory_region(memory_, total_);
#endif
    std::free(memory_);
  }

  uint8_t* data() const { return memory_ + kGuard; }
  size_t bytes() const { return bytes_; }

  void poison() { std::memset(data(), kPoison, bytes_); }

  bool guards_intact() const {
#if SIMT_ASAN
    return true;
#else
    const auto intact = [](uint8_t byte) { return byte == kPoison; };
    return std::all_of(memory_, data(), intact) &&
           std::all_of(data() + bytes_, memory_ + total_, intact);
#endif
  }

  // Addresses as instructions take them begin at kAlignment, so that zero is none.
  bool contains(const void* pointer) const {
    const auto* byte = static_cast<const uint8_t*>(pointer);
    return byte >= data() && byte <= data() + bytes_;
  }
  uint32_t address(const void* pointer) const {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - data() + kAlignment);
  }
  bool contains(uint32_t address, size_t bytes) const {
    return address >= kAlignment && address - kAlignment + bytes <= bytes_;
  }
  uint8_t* at(uint32_t address) const { return data() + (address - kAlignment); }

 private:
  static constexpr int kPoison = 0xFF;
  static constexpr size_t kGuard = 4 * kAlignment;

  size_t bytes_, total_;
  uint8_t* memory_;
};

}  // namespace simt
