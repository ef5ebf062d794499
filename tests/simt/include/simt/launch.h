// Runs the blocks of a grid on a few threads of the operating system.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "simt/block.h"

namespace simt {

// Calls body() as every thread of every block; `dependent`: before the kernel launched last is
// over. Throws the first error.
inline void run_grid(dim3 grid, int threads, int shared_bytes, bool dependent,
                     const std::function<void()>& body) {
  const Options chosen = options();
  const int64_t count = int64_t{grid.x} * grid.y * grid.z;
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
  if (chosen.seed != 0) Random(chosen.seed).shuffle(order);

  statistics() = {};
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      Block block(grid, threads, static_cast<size_t>(shared_bytes), dependent, chosen, body);
      for (size_t i; (i = next++) < order.size();) {
        const auto number = static_cast<uint64_t>(order[i]);
        block.run(dim3(static_cast<unsigned>(number % grid.x),
                       static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y)));
      }
      const std::lock_guard lock(mutex);
      statistics() += block.counts;
    } catch (...) {
      next = order.size();
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  // Not on this thread, so that nothing of a kernel that was given up is left in it.
  std::vector<std::thread> workers;
  const auto useful = std::min<int64_t>(std::max(chosen.workers, 1), count);
  for (int64_t i = 0; i < useful; ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
  launches().push_back(statistics());
}

}  // namespace simt
