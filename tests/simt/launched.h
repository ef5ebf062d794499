// For the libraries that run launchers of csrc/kernels, loaded with ctypes: their scratch, the GPU
// and the schedule that a test chooses, and what was launched.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "guarded.h"
#include "kernels/arch/arch.h"

namespace simt_test {

// NaN in every type until a kernel writes it.
struct Scratch {
  std::vector<void*> blocks;

  static void* allocate(void* context, int64_t bytes) {
    if (simt::options().limits_only) bytes = 0;  // nobody reads it, and it may be huge
    void* block = std::aligned_alloc(256, static_cast<size_t>((bytes + 255) / 256 * 256 + 256));
    memset(block, 0xFF, static_cast<size_t>(bytes));
    static_cast<Scratch*>(context)->blocks.push_back(block);
    return block;
  }
  ~Scratch() {
    for (void* block : blocks) std::free(block);
  }
};

}  // namespace simt_test

extern "C" {

const char* last_error() { return simt_test::message().c_str(); }

// How many launches there were since the last call of take_launches, and of each of the first
// `count` of them: the bytes that cp.async read from global memory, the mma.sync instructions of
// warps, the bytes that TMA wrote to shared memory, the wgmma instructions of warpgroups, and the
// bytes that TMA read.
int take_launches(int count, int64_t (*out)[5]) {
  const std::vector<simt::Statistics> launches = std::move(simt::launches());
  simt::launches().clear();
  const int known = static_cast<int>(launches.size());
  for (int i = 0; i < known && i < count; ++i) {
    const simt::Statistics& launch = launches[static_cast<size_t>(i)];
    const int64_t counts[] = {launch.copied_bytes, launch.mma, launch.tma_bytes, launch.wgmma,
                              launch.tma_read_bytes};
    std::copy(std::begin(counts), std::end(counts), out[i]);
  }
  return known;
}

// Of a launch, as it was asked for.
struct Recorded {
  const char* kernel;  // until the next call of take_recorded
  int64_t grid[3], block, cluster, shared_bytes;
  int dependent;
};

// As take_launches; also of launches whose kernels do not run (set_limits_only).
int take_recorded(int count, Recorded* out) {
  static std::vector<std::string> names;
  const std::vector<simt::RecordedLaunch> launches = std::move(simt::recorded());
  simt::recorded().clear();
  names.clear();
  for (const simt::RecordedLaunch& launch : launches) {
    names.push_back(simt::kernel_name(launch.kernel));
  }
  const int known = static_cast<int>(launches.size());
  for (int i = 0; i < known && i < count; ++i) {
    const auto& [kernel, grid, block, cluster, shared_bytes, dependent] =
        launches[static_cast<size_t>(i)];
    out[i] = {
        names[static_cast<size_t>(i)].c_str(),      {grid.x, grid.y, grid.z},           block.x,
        int64_t{cluster.x} * cluster.y * cluster.z, static_cast<int64_t>(shared_bytes), dependent};
  }
  return known;
}

// completion: 0 eager, 1 deferred, 2 random. Products are late where copies are early: so a slot
// that is released too early shows.
void set_schedule(int completion, uint64_t seed) {
  using simt::Completion;
  simt::options().copies = static_cast<Completion>(completion);
  simt::options().multiplies = completion == 2 ? Completion::kRandom : Completion::kDeferred;
  simt::options().seed = seed;
}

// The GPU, by its compute capability and multiprocessors.
void set_gpu(int capability, int multiprocessors) {
  simt::options().compute_capability = capability;
  simt::options().multiprocessors = multiprocessors;
}

// Launches are checked against the GPU's limits, and no kernel runs.
void set_limits_only(bool value) { simt::options().limits_only = value; }
}
