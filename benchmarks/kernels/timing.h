// Times of passes: between CUDA events, with a cold L2 cache, in rounds in which they take turns.
#pragma once

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <vector>

#include "passes.h"

namespace gpu_bench {

struct FlushParams {
  const uint64_t* data;
  int64_t count;
  uint64_t* out;  // never written, which the compiler does not know
};

constexpr int64_t kFlushEach = 16;  // words of a thread

// Reads, since what was written would still have to leave the cache while others are timed.
__global__ void __launch_bounds__(kElementThreads)
    flush_kernel(const __grid_constant__ FlushParams params) {
  const int64_t first = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  const int64_t threads = (params.count + kFlushEach - 1) / kFlushEach;
  uint64_t sum = 0;
  for (int64_t i = first; i < params.count; i += threads) sum += params.data[i];
  if (sum == 0x123456789) *params.out = sum;
}

// Puts other data into the L2 cache. The host launches what is timed meanwhile, so that its own
// time does not count.
class Flush {
 public:
  explicit Flush(int64_t bytes) : count_(bytes / 8) {
    if (count_ == 0) return;
    data_ = memory_.fresh<uint64_t>(static_cast<size_t>(count_));
    check(cudaMemset(data_, 0, static_cast<size_t>(count_) * 8));
  }
  void run() const {
    if (count_ == 0) return;
    // In the ordinary way: what is timed begins when it is over.
    const int64_t blocks = ceil_div(ceil_div(count_, kFlushEach), kElementThreads);
    arch::launch(flush_kernel, dim3(static_cast<unsigned>(blocks)), kElementThreads, 0, nullptr,
                 FlushParams{data_, count_, data_});
  }

 private:
  gpu_test::Memory memory_;
  int64_t count_;
  uint64_t* data_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  void record() { check(cudaEventRecord(event_, nullptr)); }
  double microseconds_since(const Event& start) const {
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, start.event_, event_));
    return 1e3 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

using Samples = std::vector<double>;

// Of one pass, by rounds.
struct Times {
  Samples gpu, host;  // in microseconds; host: until everything is launched
};

inline double quantile(Samples samples, double fraction) {
  std::sort(samples.begin(), samples.end());
  const double place = fraction * double(samples.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (place - double(below)) * (samples[above] - samples[below]);
}

// Rounds until `seconds` are over, at least three and at most `most`. In each of them every pass
// runs once, in an order drawn anew, so that the clock's drift meets all alike.
inline std::vector<Times> time_passes(const std::vector<const Pass*>& passes, const Flush& flush,
                                      double seconds, int most) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  std::vector<Times> times(passes.size());
  std::vector<Event> starts(passes.size()), stops(passes.size());
  std::vector<size_t> order(passes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 generator(1);
  const auto begin = Clock::now();
  // The first is for warming up.
  for (int round = -1; round < most && (round < 3 || since(begin) < seconds); ++round) {
    std::shuffle(order.begin(), order.end(), generator);
    Samples host(passes.size());
    for (const size_t i : order) {
      flush.run();
      starts[i].record();
      const auto launched = Clock::now();
      passes[i]->run();
      host[i] = 1e6 * since(launched);
      stops[i].record();
    }
    check(cudaDeviceSynchronize());
    for (size_t i = 0; i < passes.size() && round >= 0; ++i) {
      times[i].gpu.push_back(stops[i].microseconds_since(starts[i]));
      times[i].host.push_back(host[i]);
    }
  }
  return times;
}

}  // namespace gpu_bench
