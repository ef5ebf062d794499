// What a test chooses about how kernels are emulated, and what the emulator counts meanwhile.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace simt {

// A kernel did what no GPU allows, or what a GPU answers by hanging.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// When asynchronous work takes effect: where it is issued, as late as a wait for it allows, or
// somewhere between.
enum class Completion { kEager, kDeferred, kRandom };

// Limits of a launch: of every GPU, and the shared memory that a block gets. From "Technical
// Specifications per Compute Capability" in CUDA's programming guide.
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBlocksX = (1u << 31) - 1, kMostBlocksYZ = 65535;
constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr unsigned kMostBlocksOfCluster = 8;  // from sm_90 on; without asking for more

constexpr int shared_bytes_of(int compute_capability) {
  switch (compute_capability) {
    case 70:
      return 96 * 1024;
    case 75:
      return 64 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    default:
      return 227 * 1024;  // 90, 100, 103, 110
  }
}

struct Options {
  Completion copies = Completion::kDeferred;  // cp.async and TMA
  // wgmma. Apart from copies, because a slot that is released early shows where reads are late and
  // writes are early.
  Completion multiplies = Completion::kDeferred;
  // 0: warps and blocks take turns in their order. Otherwise an order drawn from the seed, in which
  // some warps run far ahead of others.
  uint64_t seed = 0;
  // Which thread stored what is found after every step of a thread, so that each thread has to
  // fence its own stores. Slow. Otherwise one thread's fence.proxy.async serves all.
  bool watch_stores = false;
  int workers = 2;              // blocks at the same time
  int multiprocessors = 3;      // that kernels with a block for each are told of
  int compute_capability = 90;  // of the GPU whose limits hold: 86 for sm_86
  bool limits_only = false;     // launches are checked, and no kernel runs
  size_t stack_bytes = 0;       // of a thread; 0 is enough for ordinary kernels
};

// Read by every launch.
inline Options& options() {
  static Options instance;
  return instance;
}

struct Statistics {
  int64_t copies = 0;              // cp.async instructions of threads
  int64_t copied_bytes = 0;        // read from global memory by cp.async
  int64_t mma = 0;                 // mma.sync instructions of warps
  int64_t ldmatrix_phases = 0;     // groups of eight rows that ldmatrix read
  int64_t ldmatrix_conflicts = 0;  // further accesses that bank conflicts cost them
  int64_t stmatrix_conflicts = 0;  // the same of stmatrix
  int64_t tma_bytes = 0;           // written to shared memory by TMA
  int64_t tma_read_bytes = 0;      // read for that: once, for however many blocks
  int64_t tma_stored_bytes = 0;    // written to global memory by TMA
  int64_t cluster_bytes = 0;       // read by threads from other blocks' shared memory
  int64_t wgmma = 0;               // wgmma.mma_async instructions of warpgroups
  int64_t steps = 0;               // how often a thread was resumed

  Statistics& operator+=(const Statistics& other) {
    copies += other.copies;
    copied_bytes += other.copied_bytes;
    mma += other.mma;
    ldmatrix_phases += other.ldmatrix_phases;
    ldmatrix_conflicts += other.ldmatrix_conflicts;
    stmatrix_conflicts += other.stmatrix_conflicts;
    tma_bytes += other.tma_bytes;
    tma_read_bytes += other.tma_read_bytes;
    tma_stored_bytes += other.tma_stored_bytes;
    cluster_bytes += other.cluster_bytes;
    wgmma += other.wgmma;
    steps += other.steps;
    return *this;
  }
};

// Of every launch, until the vector is cleared.
inline std::vector<Statistics>& launches() {
  static std::vector<Statistics> instance;
  return instance;
}

// Of the last launch.
inline Statistics& statistics() {
  static Statistics instance;
  return instance;
}

// Calls of the host that are neither launches nor asked for the current device: what a GPU has,
// attributes of kernels, tensor maps. Each costs the host as long as a part of a launch.
inline std::atomic<int64_t>& questions() {
  static std::atomic<int64_t> count = 0;
  return count;
}

}  // namespace simt
