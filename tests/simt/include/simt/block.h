// A block of CUDA threads: who may go on, who waits for whom, and in which order they run.
//
// A thread runs until it has to wait. So the order of its warps is the scheduler's choice at every
// barrier and at every instruction that a warp executes together.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "simt/options.h"
#include "simt/proxies.h"
#include "simt/random.h"
#include "simt/shared_memory.h"
#include "simt/thread.h"

namespace simt {

class Cluster;

class Block {
 public:
  // Every thread calls the body; `dependent`: while the kernel before may still run.
  Block(dim3 grid, int threads, size_t shared_bytes, bool dependent, const Options& options,
        std::function<void()> body)
      : grid(grid),
        thread_count(threads),
        dependent(dependent),
        options(options),
        shared(shared_bytes),
        proxies(shared),
        random(0),
        stacks_(threads, options.stack_bytes ? options.stack_bytes : kStackBytes),
        body_(std::move(body)),
        threads_(static_cast<size_t>(threads)) {}

  // What a cluster does with its blocks (cluster.h): each is started, given turns until it ends,
  // and looked at in the end.
  void start(dim3 block_index);
  bool step();
  bool ended() const { return unfinished_ == 0; }
  void complete_transfer();
  void finish();
  std::string deadlock() const;

  // For the thread that is running.

  Thread& thread() { return *running_; }
  int lane() const { return running_->number % kWarp; }
  [[noreturn]] void fail(const std::string& message) const;
  void check(bool condition, const char* message) const {
    if (!condition) fail(message);
  }

  // Fails if the running thread has not waited for the kernel before.
  void check_previous_kernel(const char* what) const {
    if (running_->may_access) return;
    fail(std::string(what) + " without wait_for_previous_kernel, in a dependent launch");
  }

  // Does not return before ready(argument), which is asked often.
  void wait(bool (*ready)(const void*), const void* argument, const char* where) {
    running_->ready = ready;
    running_->ready_argument = argument;
    suspend(where);
    running_->ready = nullptr;
  }

  // Where another warp may overtake this one on a GPU, it does from time to time.
  void preempt() {
    if (options.seed == 0 || !random.one_in(4)) return;
    reorder_ = true;
    suspend("preempted");
  }

  // The last of the expected members calls function(slots) for all of them.
  template <int kSize, class Function>
  void meet(Rendezvous<kSize>& rendezvous, int member,
            const typename Rendezvous<kSize>::Members& expected, const char* operation, void* slot,
            Function&& function);
  template <class Function>
  void warp_operation(uint32_t mask, const char* operation, void* slot, Function&& function);
  template <class Function>
  void warpgroup_operation(const char* operation, void* slot, Function&& function);

  Warpgroup& warpgroup() { return warpgroups_[static_cast<size_t>(running_->number / kWarpgroup)]; }
  void complete_multiply(Warpgroup& warpgroup) {
    const Multiply multiply = warpgroup.multiplies.front();
    warpgroup.multiplies.pop_front();
    multiply.run(*this, multiply);
  }

  // Applies a cp.async of this thread.
  void complete(const Thread& thread, const Copy& copy) {
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    std::memset(copy.shared + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
    if (options.watch_stores) proxies.attribute(thread.number);
  }

  // Fails if TMA or wgmma (`who`) would not see what threads stored there.
  void check_fenced(uint32_t address, size_t bytes, const char* who);
  void stored_asynchronously(uint32_t address, size_t bytes) {
    proxies.stored_asynchronously(address - SharedMemory::kAlignment, bytes);
  }

  void barrier(int number, int expected, const char* where, bool stay = true);

  dim3 grid;
  int thread_count;
  bool dependent;
  dim3 index;
  Cluster* cluster = nullptr;
  int rank = 0;  // in it
  Options options;
  SharedMemory shared;
  Proxies proxies;
  Random random;
  Statistics counts;
  std::vector<std::function<void()>> transfers;  // TMA that has not taken effect
  std::vector<uint32_t> mbarriers;               // that were initialised

 private:
#if SIMT_ASAN
  static constexpr size_t kStackBytes = 256 << 10;
#else
  static constexpr size_t kStackBytes = 64 << 10;
#endif

  void suspend(const char* where) {
    running_->where = where;
    running_->fiber.suspend();
  }
  bool run_warp(int warp);
  void complete_at_random();
  std::string place() const;
  std::string who_waits() const;

  Stacks stacks_;
  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<int> order_;  // of the warps
  bool reorder_ = false;
  int unfinished_ = 0;
  Thread* running_ = nullptr;
  std::string error_;

  // Of each warp 32, one for each lane that may be the first of a mask.
  std::vector<Rendezvous<kWarp>> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::array<Barrier, kBarriers> barriers_;
};

// The block whose threads this thread of the operating system runs.
inline constinit thread_local Block* current_block = nullptr;
inline Block& block() { return *current_block; }

}  // namespace simt

#include "simt/block_inl.h"
