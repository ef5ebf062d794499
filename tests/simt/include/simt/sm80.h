// The instructions of csrc/kernels/arch/ptx_sm80.h, with bodies that a CPU can run.
#pragma once

#include <array>
#include <cstring>

#include "kernels/arch/fragments_sm80.h"
#include "kernels/element.h"
#include "simt/arithmetic.h"
#include "simt/block.h"

namespace lora_ext::arch {

inline uint32_t shared_address(const void* p) {
  const simt::Block& block = simt::block();
  block.check(block.shared.contains(p), "shared_address of what is not in shared memory");
  return block.shared.address(p);
}

// ---- Copies ------------------------------------------------------------------------------------

inline void cp_async_16(uint32_t shared, const void* global, int bytes) {
  simt::Block& block = simt::block();
  block.check_previous_kernel("cp.async");
  block.check(shared % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0,
              "cp.async: an address is no multiple of 16");
  block.check(bytes >= 0 && bytes <= 16, "cp.async: 0 to 16 bytes");
  block.check(block.shared.contains(shared, 16), "cp.async: outside of shared memory");
  ++block.counts.copies;
  block.counts.copied_bytes += bytes;
  simt::Thread& thread = block.thread();
  const simt::Copy copy{block.shared.at(shared), global, bytes, thread.group};
  if (block.options.copies == simt::Completion::kEager) {
    block.complete(thread, copy);
  } else {
    thread.copies.push_back(copy);
  }
}

inline void cp_async_commit() {
  ++simt::block().thread().group;
  simt::block().preempt();
}

template <int kGroups>
inline void cp_async_wait() {
  simt::Thread& thread = simt::block().thread();
  std::erase_if(thread.copies, [&](const simt::Copy& copy) {
    // Copies that are not committed belong to group thread.group.
    const bool over = copy.group + kGroups < thread.group;
    if (over) simt::block().complete(thread, copy);
    return over;
  });
  simt::block().preempt();
}

// ---- ldmatrix ----------------------------------------------------------------------------------

template <bool kTranspose>
inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t shared) {
  struct Slot {
    uint32_t* out;
    uint32_t shared;
  } slot{out, shared};
  constexpr const char* kName = kTranspose ? "ldmatrix.x4.trans" : "ldmatrix.x4";
  simt::block().warp_operation(0xFFFFFFFFu, kName, &slot, [](const auto& slots) {
    simt::Block& block = simt::block();
    const auto slot_of = [&](int lane) {
      return static_cast<const Slot*>(slots[static_cast<size_t>(lane)]);
    };
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      std::array<int64_t, 8> accesses{};  // of each four banks; the rows of a matrix are distinct
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = slot_of(matrix * 8 + row)->shared;
        block.check(address % 16 == 0, "ldmatrix: an address is no multiple of 16");
        block.check(block.shared.contains(address, 16), "ldmatrix: outside of shared memory");
        std::memcpy(element[row], block.shared.at(address), 16);
        ++accesses[address / 16 % 8];
      }
      ++block.counts.ldmatrix_phases;
      block.counts.ldmatrix_conflicts += *std::max_element(accesses.begin(), accesses.end()) - 1;
      for (int lane = 0; lane < simt::kWarp; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t first = kTranspose ? element[column][row] : element[row][column];
        const uint32_t second = kTranspose ? element[column + 1][row] : element[row][column + 1];
        slot_of(lane)->out[matrix] = first | second << 16;
      }
    }
  });
}

// ---- mma.sync ----------------------------------------------------------------------------------

// Sums in float, one product after the other. Tensor cores add in another order and truncate, so
// results agree up to rounding.
template <class T>
inline void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  struct Slot {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
  } slot{c, a, b};
  simt::block().warp_operation(0xFFFFFFFFu, "mma.m16n8k16", &slot, [](const auto& slots) {
    float full_a[16][16], full_b[16][8];
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      const auto* own = static_cast<const Slot*>(slots[static_cast<size_t>(lane)]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
        full_a[row][column] = first_of<T>(own->a[i]);
        full_a[row][column + 1] = second_of<T>(own->a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i * 8, column = lane / 4;
        full_b[row][column] = first_of<T>(own->b[i]);
        full_b[row + 1][column] = second_of<T>(own->b[i]);
      }
    }
    float product[16][8];
    simt::multiply_matrices(full_a, full_b, product);
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      const auto* own = static_cast<const Slot*>(slots[static_cast<size_t>(lane)]);
      for (int i = 0; i < 4; ++i) {
        own->c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
    }
    ++simt::block().counts.mma;
  });
}

}  // namespace lora_ext::arch
