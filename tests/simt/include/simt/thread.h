// The threads of a block, and what they come together at.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "simt/fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kBarriers = 16;

// A cp.async that has been issued and not taken effect.
struct Copy {
  uint8_t* shared;
  const void* global;
  int bytes;  // the rest up to 16 becomes zero
  uint32_t group;
};

// A box of shared memory that TMA has been told to write to global memory and has not read yet.
struct BoxStore {
  std::function<void()> run;
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
  bool may_access = true;  // global memory: the kernel before is over
  // What other blocks of its cluster stored: it has waited since it last told them of its own work.
  bool sees_cluster = false;

  std::vector<Copy> copies;
  uint32_t group = 0;  // that copies are added to
  std::vector<BoxStore> stores;
  uint32_t store_group = 0;
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

class Block;

// A wgmma that has been issued and not taken effect.
struct Multiply {
  struct Registers {
    float* d;
    uint32_t a[4];
  };
  void (*run)(const Block&, const Multiply&);
  uint64_t a, b;  // descriptors
  bool accumulate;
  bool a_in_registers;
  uint32_t group;
  std::array<Registers, kWarpgroup> threads;
};

struct Warpgroup {
  Rendezvous<kWarpgroup> rendezvous;
  std::deque<Multiply> multiplies;  // they take effect in order
  uint32_t group = 0;               // that multiplies are added to
  bool fenced = false;              // since the last group ended
};

struct Barrier {
  uint32_t generation = 0;
  int expected = 0, arrived = 0;
};

}  // namespace simt
