// Blocks that run at the same time and reach each other's shared memory, one unless a launch names
// more. One thread of the operating system runs all of them.
#pragma once

#include <memory>
#include <numeric>

#include "simt/any_gpu.h"
#include "simt/block.h"

namespace simt {

class Cluster {
 public:
  Cluster(int size, dim3 grid, int threads, size_t shared_bytes, bool dependent,
          const Options& options, const std::function<void()>& body)
      : options_(options) {
    for (int rank = 0; rank < size; ++rank) {
      blocks_.push_back(
          std::make_unique<Block>(grid, threads, shared_bytes, dependent, options, body));
      blocks_.back()->cluster = this;
      blocks_.back()->rank = rank;
    }
  }

  // The blocks from this one on, along x.
  void run(dim3 first);

  int size() const { return static_cast<int>(blocks_.size()); }
  Block& block(int rank) { return *blocks_[static_cast<size_t>(rank)]; }

  // The running thread waits for all threads of all blocks.
  void barrier() {
    const Seen seen{&generation_, generation_};
    if (++arrived_ == size() * simt::block().thread_count) {
      arrived_ = 0;
      ++generation_;
    } else {
      simt::block().wait(Seen::over, &seen, "cluster_sync");
    }
  }

  Statistics counts() const {
    Statistics sum;
    for (const auto& block : blocks_) sum += block->counts;
    return sum;
  }

 private:
  bool step();
  bool complete_transfer();

  Options options_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<int> order_;
  Random random_{0};
  uint32_t generation_ = 0;
  int arrived_ = 0;
};

inline void Cluster::run(dim3 first) {
  order_.resize(blocks_.size());
  std::iota(order_.begin(), order_.end(), 0);
  random_ = Random(options_.seed * 0x9E3779B97F4A7C15u + first.x + (uint64_t{first.y} << 20));
  arrived_ = 0;
  for (unsigned rank = 0; rank < blocks_.size(); ++rank) {
    blocks_[rank]->start(dim3(first.x + rank, first.y, first.z));
  }
  const auto ended = [](const auto& block) { return block->ended(); };
  while (!std::all_of(blocks_.begin(), blocks_.end(), ended)) {
    if (step() || complete_transfer()) continue;
    std::string report;
    for (const auto& block : blocks_) {
      if (block->ended() && size() > 1) continue;
      report += (report.empty() ? "" : ";; ") + block->deadlock();
    }
    throw Error(report);
  }
  for (const auto& block : blocks_) block->finish();
}

// With a seed one block runs as far as it can before the next gets a turn, as warps do in a block.
inline bool Cluster::step() {
  const bool drawn = options_.seed != 0;
  if (drawn && random_.one_in(64)) random_.shuffle(order_);
  bool moved = false;
  for (const int rank : order_) {
    if (drawn && moved) break;
    current_block = blocks_[static_cast<size_t>(rank)].get();
    if (!current_block->ended()) moved |= current_block->step();
  }
  return moved;
}

inline bool Cluster::complete_transfer() {
  for (const int rank : order_) {
    Block& block = *blocks_[static_cast<size_t>(rank)];
    if (block.transfers.empty()) continue;
    block.complete_transfer();
    return true;
  }
  return false;
}

// Addresses of another block's shared memory, as instructions for clusters take them, say which.
constexpr int kRankShift = 24;

struct Place {
  Block& block;
  uint32_t address;  // in its shared memory
};

// An address without a rank is the running block's.
inline Place place_of(uint32_t address) {
  const int rank = static_cast<int>(address >> kRankShift) - 1;
  if (rank < 0) return {block(), address};
  block().check(rank < block().cluster->size(), "an address of a block that the cluster has not");
  Block& other = block().cluster->block(rank);
  block().check(!other.ended(), "an access to the shared memory of a block that has ended");
  return {other, address & ((1u << kRankShift) - 1)};
}

}  // namespace simt

namespace lora_ext::arch {

inline int cluster_size() { return simt::block().cluster->size(); }
inline int cluster_rank() { return simt::block().rank; }

inline void cluster_sync() {
  simt::block().cluster->barrier();
  simt::block().preempt();
}
inline void cluster_sync_stores() {
  simt::block().thread().sees_cluster = false;
  cluster_sync();
  simt::block().thread().sees_cluster = true;
}

inline uint32_t cluster_address(uint32_t shared, int rank) {
  return shared | static_cast<uint32_t>(rank + 1) << simt::kRankShift;
}

template <class Value>
Value cluster_load(uint32_t address) {
  constexpr uint32_t kBytes = sizeof(Value);
  simt::Block& own = simt::block();
  const auto [block, place] = simt::place_of(address);
  own.check(own.thread().sees_cluster,
            "cluster_load: the thread has not waited since it last arrived: cluster_sync_stores, "
            "mbarrier_wait_cluster");
  own.check(place % kBytes == 0, "cluster_load: the address is no multiple of its size");
  own.check(block.shared.contains(place, kBytes), "cluster_load: outside of shared memory");
  if (&block != &own) own.counts.cluster_bytes += kBytes;
  Value value;
  std::memcpy(&value, block.shared.at(place), kBytes);
  return value;
}
inline float cluster_load_float(uint32_t address) { return cluster_load<float>(address); }
inline Words cluster_load_16(uint32_t address) { return cluster_load<Words>(address); }

}  // namespace lora_ext::arch
