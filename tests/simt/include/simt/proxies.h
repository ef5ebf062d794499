// Which stores to shared memory TMA and wgmma may not have seen.
//
// They reach memory by another way than a thread's own loads and stores (the "async proxy"), and
// see what threads stored only after a fence.proxy.async. Plain stores cannot be intercepted, so a
// second copy of shared memory holds what is accounted for; where the two differ, somebody stored.
// A store that changes nothing is not noticed.
#pragma once

#include <cstring>
#include <vector>

#include "simt/shared_memory.h"

namespace simt {

class Proxies {
 public:
  static constexpr int kNobody = 0;
  static constexpr int kUnknown = -1;

  explicit Proxies(const SharedMemory& shared) : shared_(shared) {}

  void reset() {
    accounted_.assign(shared_.data(), shared_.data() + shared_.bytes());
    writer_.assign((shared_.bytes() + kGranule - 1) / kGranule, kNobody);
  }

  // What has changed was stored by this thread.
  void attribute(int thread) { attribute(0, shared_.bytes(), thread + 1); }
  void attribute(size_t first, size_t bytes, int writer) {
    for (size_t i = first / kGranule; i * kGranule < first + bytes; ++i) {
      const size_t begin = i * kGranule, size = std::min(kGranule, shared_.bytes() - begin);
      if (std::memcmp(&accounted_[begin], shared_.data() + begin, size) == 0) continue;
      std::memcpy(&accounted_[begin], shared_.data() + begin, size);
      writer_[i] = writer;
    }
  }

  // A fence by this thread; of all stores, unless they are only its own.
  void fence(int thread, bool only_own) {
    attribute(thread);
    for (int& writer : writer_) {
      if (!only_own || writer == thread + 1) writer = kNobody;
    }
  }

  // kNobody if the bytes are fenced; otherwise 1 + a thread that stored there, or kUnknown.
  int unfenced(size_t first, size_t bytes) {
    attribute(first, bytes, kUnknown);
    for (size_t i = first / kGranule; i * kGranule < first + bytes; ++i) {
      if (writer_[i] != kNobody) return writer_[i];
    }
    return kNobody;
  }

  // The asynchronous proxy itself stored there.
  void stored_asynchronously(size_t first, size_t bytes) { attribute(first, bytes, kNobody); }

 private:
  static constexpr size_t kGranule = 16;

  const SharedMemory& shared_;
  std::vector<uint8_t> accounted_;
  std::vector<int> writer_;  // of each granule
};

}  // namespace simt
