// What autotune measured on the GPUs of this process: the fastest way of a call. Rows count by
// their power of two, everything else as it is.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

#include "cuda/lora_linear_path.h"

namespace lora_ext {

class TunedPaths {
 public:
  // `wish` is not Auto; none forgets the call.
  void set(const CudaCall& call, std::optional<CudaWish> wish) {
    const std::lock_guard lock(mutex_);
    if (wish) {
      wishes_[key(call)] = *wish;
    } else {
      wishes_.erase(key(call));
    }
    any_ = !wishes_.empty();
  }

  std::optional<CudaWish> find(const CudaCall& call) const {
    if (!any_) return std::nullopt;
    const std::lock_guard lock(mutex_);
    const auto found = wishes_.find(key(call));
    return found == wishes_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  using Key = std::array<int64_t, 10>;

  static Key key(const CudaCall& call) {
    int64_t bits = 0;
    while (call.M >> bits > 1) ++bits;
    return {call.backward, call.device, bits,         call.N,       call.K,
            call.r,        call.base,   call.adapter, call.dropout, static_cast<int>(call.rows)};
  }

  std::map<Key, CudaWish> wishes_;
  mutable std::mutex mutex_;
  std::atomic<bool> any_ = false;
};

}  // namespace lora_ext
