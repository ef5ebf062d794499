// A block of CUDA threads: who may go on, who waits for whom, and in which order they run.
//
// A thread runs until it has to wait. So the order of its warps is the scheduler's choice at every
// barrier and at every instruction that a warp executes together.
#pragma once

#include <array>
#include <bitset>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.h"
#include "simt/options.h"
#include "simt/shared_memory.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kBarriers = 16;

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  size_t below(size_t bound) { return static_cast<size_t>((*this)() % bound); }
  bool one_in(int n) { return below(static_cast<size_t>(n)) == 0; }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  uint64_t state_;
};

// A cp.async that has been issued and not taken effect.
struct Copy {
  uint8_t* shared;
  const void* global;
  int bytes;  // the rest up to 16 becomes zero
  uint32_t group;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int number = 0;

  // It may go on when this says so; null: at any time.
  bool (*ready)(const void*) = nullptr;
  const void* ready_argument = nullptr;
  const char* where = "";  // it waits, for the report of a deadlock

  std::vector<Copy> copies;
  uint32_t group = 0;  // that copies are added to
};

// Where the threads of a warp or warpgroup come together for one operation. Each brings a slot with
// its operands and results.
template <int kSize>
struct Rendezvous {
  using Members = std::bitset<kSize>;

  uint32_t generation = 0;
  const char* operation = "";
  Members expected, present;
  std::array<void*, kSize> slots{};
};

struct Barrier {
  uint32_t generation = 0;
  int expected = 0, arrived = 0;
};

class Block {
 public:
  // Every thread calls body(argument).
  Block(dim3 grid, int threads, size_t shared_bytes, const Options& options,
        std::function<void()> body)
      : grid(grid),
        threads_count(threads),
        options(options),
        shared(shared_bytes),
        random(0),
        stacks_(threads, options.stack_bytes ? options.stack_bytes : kStackBytes),
        body_(std::move(body)),
        threads_(static_cast<size_t>(threads)) {}

  void run(dim3 block_index);

  // For the thread that is running.

  Thread& thread() { return *running_; }
  int lane() const { return running_->number % kWarp; }
  [[noreturn]] void fail(const std::string& message) const;
  void check(bool condition, const char* message) const {
    if (!condition) fail(message);
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

  void barrier(int number, int expected, const char* where, bool stay = true);

  dim3 grid;
  int threads_count;
  dim3 index;
  Options options;
  SharedMemory shared;
  Random random;
  Statistics counts;
  std::vector<std::function<void()>> transfers;  // TMA that has not taken effect

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
  void start();
  bool step();
  bool run_warp(int warp);
  bool complete_something();
  void finish();
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
  std::vector<Rendezvous<kWarpgroup>> warpgroups_;
  std::array<Barrier, kBarriers> barriers_;
};

// The block whose threads this thread of the operating system runs.
inline constinit thread_local Block* current_block = nullptr;
inline Block& block() { return *current_block; }

// Applies a cp.async.
inline void complete(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(copy.shared + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

}  // namespace simt

#include "simt/block_inl.h"
