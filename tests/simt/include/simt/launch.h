// Runs the clusters of a grid on a few threads of the operating system.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "simt/cluster.h"

namespace simt {

// Calls body() as every thread of every block, in clusters of so many along x; `dependent`: before
// the kernel launched last is over. Throws the first error.
inline void run_grid(dim3 grid, unsigned cluster_size, int threads, int shared_bytes,
                     bool dependent, const std::function<void()>& body) {
  const Options chosen = options();
  const dim3 clusters(grid.x / cluster_size, grid.y, grid.z);
  const int64_t count = int64_t{clusters.x} * clusters.y * clusters.z;
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
  if (chosen.seed != 0) Random(chosen.seed).shuffle(order);

  statistics() = {};
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      Cluster cluster(static_cast<int>(cluster_size), grid, threads,
                      static_cast<size_t>(shared_bytes), dependent, chosen, body);
      for (size_t i; (i = next++) < order.size();) {
        const auto number = static_cast<uint64_t>(order[i]);
        cluster.run(dim3(static_cast<unsigned>(number % clusters.x) * cluster_size,
                         static_cast<unsigned>(number / clusters.x % clusters.y),
                         static_cast<unsigned>(number / clusters.x / clusters.y)));
      }
      const std::lock_guard lock(mutex);
      statistics() += cluster.counts();
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
