// Bodies of block.h.
#pragma once

#include "simt/block.h"

namespace simt {

// "; mbarrier at byte 16384: 1 of 2 arrivals and 0 bytes to come"; see mbarrier.h.
inline std::string mbarrier_states(const Block& block);

// ---- What a thread does ------------------------------------------------------------------------

inline void Block::fail(const std::string& message) const {
  const int number = running_->number;
  throw Error(place() + ", thread " + std::to_string(number) + " (warp " +
              std::to_string(number / kWarp) + ", lane " + std::to_string(number % kWarp) +
              "): " + message);
}

// Whether a generation, of which one was seen, is over.
struct Seen {
  const uint32_t* generation;
  uint32_t value;
  static bool over(const void* seen) {
    const auto& [generation, value] = *static_cast<const Seen*>(seen);
    return *generation != value;
  }
};

template <int kSize, class Function>
void Block::meet(Rendezvous<kSize>& rendezvous, int member,
                 const typename Rendezvous<kSize>::Members& expected, const char* operation,
                 void* slot, Function&& function) {
  if (rendezvous.present.none()) {
    rendezvous.operation = operation;
    rendezvous.expected = expected;
  } else if (rendezvous.operation != operation) {
    fail(std::string(operation) + " meets " + rendezvous.operation +
         " of other threads of the same warp or warpgroup: they have diverged");
  }
  check(rendezvous.expected == expected, "threads of one operation name different masks");
  rendezvous.present.set(static_cast<size_t>(member));
  rendezvous.slots[static_cast<size_t>(member)] = slot;
  if (rendezvous.present == expected) {
    rendezvous.present.reset();
    ++rendezvous.generation;
    function(rendezvous.slots);
  } else {
    const Seen seen{&rendezvous.generation, rendezvous.generation};
    wait(Seen::over, &seen, operation);
  }
}

template <class Function>
void Block::warp_operation(uint32_t mask, const char* operation, void* slot, Function&& function) {
  const int lane = this->lane();
  check(mask >> lane & 1, "the calling lane is not in its mask");
  const int first = __builtin_ctz(mask);
  const auto number = static_cast<size_t>(running_->number - lane + first);
  meet<kWarp>(warps_[number], lane, std::bitset<kWarp>(mask), operation, slot,
              std::forward<Function>(function));
}

template <class Function>
void Block::warpgroup_operation(const char* operation, void* slot, Function&& function) {
  check(thread_count % kWarpgroup == 0, "the block is not made of whole warpgroups");
  meet<kWarpgroup>(warpgroup().rendezvous, running_->number % kWarpgroup,
                   std::bitset<kWarpgroup>().set(), operation, slot,
                   std::forward<Function>(function));
}

inline void Block::barrier(int number, int expected, const char* where, bool stay) {
  check(number >= 0 && number < kBarriers, "there are 16 barriers");
  check(expected > 0 && expected % kWarp == 0 && expected <= thread_count,
        "a barrier is for whole warps of the block");
  Barrier& barrier = barriers_[static_cast<size_t>(number)];
  if (barrier.arrived == 0) barrier.expected = expected;
  check(barrier.expected == expected, "threads of one barrier expect different numbers");
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else if (stay) {
    const Seen seen{&barrier.generation, barrier.generation};
    wait(Seen::over, &seen, where);
  }
}

inline void Block::check_fenced(uint32_t address, size_t bytes, const char* who) {
  const int writer = proxies.unfenced(address - SharedMemory::kAlignment, bytes);
  if (writer == Proxies::kNobody) return;
  const std::string thread =
      writer == Proxies::kUnknown ? "a thread" : "thread " + std::to_string(writer - 1);
  fail(std::string(who) + " shared memory that " + thread + " stored to without fence_proxy_async");
}

// ---- What the scheduler does -------------------------------------------------------------------

inline std::string Block::deadlock() const {
  return place() + ": deadlock: " + who_waits() + mbarrier_states(*this);
}

inline void Block::start(dim3 block_index) {
  index = block_index;
  shared.poison();
  proxies.reset();
  mbarriers.clear();
  random = Random(options.seed * 0x100000001B3u + index.x + (uint64_t{index.y} << 20) +
                  (uint64_t{index.z} << 40));
  const auto warps = (threads_.size() + kWarp - 1) / kWarp;
  warps_.assign(warps * kWarp, {});
  warpgroups_.assign((threads_.size() + kWarpgroup - 1) / kWarpgroup, {});
  barriers_.fill({});
  order_.resize(warps);
  for (size_t i = 0; i < warps; ++i) order_[i] = static_cast<int>(i);
  reorder_ = options.seed != 0;
  unfinished_ = thread_count;
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    thread.index = dim3(static_cast<unsigned>(i), 0, 0);
    thread.number = i;
    thread.ready = nullptr;
    thread.group = thread.store_group = 0;
    thread.may_access = !dependent;
    thread.sees_cluster = false;
    const auto entry = [](void* self) {
      auto& block = *static_cast<Block*>(self);
      try {
        block.body_();
        block.check_previous_kernel("it ends");
      } catch (const std::exception& error) {
        block.error_ = error.what();
      }
    };
    thread.fiber.start(stacks_[i], stacks_.bytes(), entry, this);
  }
}

// Lets some threads go on; false if none can. With a seed the first warp of the order runs as far
// as it can before the next gets a turn, until a new order is drawn: warps that are far apart show
// what a missing barrier leaves unprotected.
inline bool Block::step() {
  complete_at_random();
  if (options.seed == 0) {
    bool moved = false;
    for (const int warp : order_) moved |= run_warp(warp);
    return moved;
  }
  if (reorder_ || random.one_in(16)) random.shuffle(order_);
  reorder_ = false;
  for (const int warp : order_) {
    if (run_warp(warp)) return true;
  }
  return false;
}

inline bool Block::run_warp(int warp) {
  const int first = warp * kWarp, last = std::min(first + kWarp, thread_count);
  const bool backwards = options.seed != 0 && random.one_in(2);
  bool moved = false;
  for (int i = first; i < last; ++i) {
    Thread& thread = threads_[static_cast<size_t>(backwards ? first + last - 1 - i : i)];
    if (thread.fiber.finished()) continue;
    if (thread.ready != nullptr && !thread.ready(thread.ready_argument)) continue;
    moved = true;
    ++counts.steps;
    running_ = &thread;
    thread.fiber.resume();
    if (options.watch_stores) proxies.attribute(thread.number);
    if (!error_.empty()) throw Error(error_);
    unfinished_ -= thread.fiber.finished();
  }
  return moved;
}

inline void Block::complete_transfer() {
  const size_t i = options.seed != 0 ? random.below(transfers.size()) : 0;
  const auto transfer = std::move(transfers[i]);
  transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(i));
  transfer();
}

inline void Block::complete_at_random() {
  if (options.copies == Completion::kRandom && random.one_in(4)) {
    if (!transfers.empty()) complete_transfer();
    Thread& thread = threads_[random.below(threads_.size())];
    if (!thread.copies.empty()) {
      const size_t i = random.below(thread.copies.size());
      complete(thread, thread.copies[i]);
      thread.copies.erase(thread.copies.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (!thread.stores.empty()) {
      thread.stores.front().run();
      thread.stores.erase(thread.stores.begin());
    }
  }
  if (options.multiplies == Completion::kRandom && random.one_in(4)) {
    Warpgroup& warpgroup = warpgroups_[random.below(warpgroups_.size())];
    if (!warpgroup.multiplies.empty()) complete_multiply(warpgroup);
  }
}

inline void Block::finish() {
  for (const Thread& thread : threads_) {
    if (thread.copies.empty() && thread.stores.empty()) continue;
    throw Error(place() + ": thread " + std::to_string(thread.number) +
                " ends without having waited for its " +
                (thread.copies.empty() ? "TMA stores" : "cp.async"));
  }
  for (const Warpgroup& warpgroup : warpgroups_) {
    if (warpgroup.multiplies.empty()) continue;
    throw Error(place() + ": it ends without having waited for wgmma");
  }
  if (!transfers.empty()) throw Error(place() + ": it ends without having waited for a TMA copy");
  if (!shared.guards_intact()) throw Error(place() + ": a store outside of shared memory");
}

inline std::string Block::place() const {
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

// "threads 0-31 wait in __syncthreads; threads 32-63 ended"
inline std::string Block::who_waits() const {
  const auto state = [](const Thread& thread) {
    return thread.fiber.finished() ? std::string("ended") : std::string("wait in ") + thread.where;
  };
  std::string report;
  for (size_t first = 0, last; first < threads_.size(); first = last) {
    last = first + 1;
    while (last < threads_.size() && state(threads_[last]) == state(threads_[first])) ++last;
    report += (first ? "; threads " : "threads ") + std::to_string(first) + "-" +
              std::to_string(last - 1) + " " + state(threads_[first]);
  }
  return report;
}

}  // namespace simt
