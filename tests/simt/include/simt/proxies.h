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
    stored_.clear();
  }

  // What has changed was stored by this thread.
  void attribute(int thread) { attribute(0, shared_.bytes(), thread + 1); }
  void attribute(size_t first, size_t bytes, int writer) {
    const size_t last = std::min((first + bytes + kGranule - 1) / kGranule, writer_.size());
    for (size_t i = first / kGranule; i < last;) {
      const size_t end = std::min(last, i + kCompared);
      if (differ(i, end)) {
        for (size_t k = i; k < end; ++k) {
          if (differ(k, k + 1)) account(k, writer);
        }
      }
      i = end;
    }
  }

  // A fence by this thread; of all stores, unless they are only its own.
  void fence(int thread, bool only_own) {
    attribute(thread);
    std::erase_if(stored_, [&](size_t i) {
      if (!only_own || writer_[i] == thread + 1) writer_[i] = kNobody;
      return writer_[i] == kNobody;
    });
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
  static constexpr size_t kGranule = 16;    // bytes
  static constexpr size_t kCompared = 256;  // granules at once: most of the time nothing changed

  // Granules [first, last).
  bool differ(size_t first, size_t last) const {
    const size_t begin = first * kGranule, end = std::min(last * kGranule, shared_.bytes());
    return std::memcmp(&accounted_[begin], shared_.data() + begin, end - begin) != 0;
  }

  void account(size_t i, int writer) {
    const size_t begin = i * kGranule;
    std::memcpy(&accounted_[begin], shared_.data() + begin,
                std::min(kGranule, shared_.bytes() - begin));
    if (writer_[i] == kNobody && writer != kNobody) stored_.push_back(i);
    writer_[i] = writer;
  }

  const SharedMemory& shared_;
  std::vector<uint8_t> accounted_;
  std::vector<int> writer_;     // of each granule
  std::vector<size_t> stored_;  // granules with a writer, and some without
};

}  // namespace simt
