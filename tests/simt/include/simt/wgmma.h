// wgmma: products of a warpgroup whose operands lie in shared memory.
#pragma once

#include <type_traits>

#include "kernels/arch/descriptor_sm90.h"
#include "kernels/arch/fragments_sm80.h"
#include "kernels/element.h"
#include "simt/arithmetic.h"
#include "simt/block.h"

namespace simt {

// What a descriptor says.
struct Operand {
  uint32_t start, leading, stride;
  lora_ext::arch::Swizzle swizzle;
  lora_ext::arch::Major major;

  Operand(uint64_t descriptor, lora_ext::arch::Major major)
      : start(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4),
        swizzle(static_cast<lora_ext::arch::Swizzle>(descriptor >> 62)),
        major(major) {}

  // Of element (row, k) of A, or (column, k) of B; see wgmma_descriptor.
  uint32_t address(uint32_t row, uint32_t k) const {
    using lora_ext::arch::Major, lora_ext::arch::Swizzle;
    const auto width = static_cast<uint32_t>(lora_ext::arch::swizzle_bytes(swizzle));
    uint32_t offset;
    if (major == Major::kK && swizzle == Swizzle::kNone) {
      offset = row / 8 * stride + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
    } else if (major == Major::kK) {
      offset = row / 8 * stride + row % 8 * width + k * 2;
    } else if (swizzle == Swizzle::kNone) {
      offset = row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
    } else {
      const uint32_t span = width / 2;
      offset = row / span * leading + row % span * 2 + k / 8 * stride + k % 8 * width;
    }
    return lora_ext::arch::swizzled(start + offset, swizzle);
  }

  // Everything that an instruction reads.
  void check(uint32_t rows) const {
    Block& block = simt::block();
    const auto width = static_cast<uint32_t>(lora_ext::arch::swizzle_bytes(swizzle));
    block.check(width == 16 || start % (width * 8) < 128,
                "wgmma: an operand that begins within eight rows needs a base offset, which is not "
                "emulated");
    for_chunks(rows, [&](uint32_t row, uint32_t k) {
      const uint32_t chunk = address(row, k);
      block.check(block.shared.contains(chunk, 16), "wgmma: an operand outside of shared memory");
      block.check_fenced(chunk, 16, "wgmma reads");
    });
  }

  // store(row, k, value) of all elements.
  template <class T, class Store>
  void read(const Block& block, uint32_t rows, const Store& store) const {
    const bool k_major = major == lora_ext::arch::Major::kK;
    for_chunks(rows, [&](uint32_t row, uint32_t k) {
      T elements[8];
      std::memcpy(elements, block.shared.at(address(row, k)), sizeof(elements));
      for (uint32_t i = 0; i < 8; ++i) {
        store(k_major ? row : row + i, k_major ? k + i : k, to_float(elements[i]));
      }
    });
  }

 private:
  // The first elements of all that lie 16 bytes together.
  template <class Visit>
  void for_chunks(uint32_t rows, const Visit& visit) const {
    const bool k_major = major == lora_ext::arch::Major::kK;
    for (uint32_t row = 0; row < rows; row += k_major ? 1 : 8) {
      for (uint32_t k = 0; k < 16; k += k_major ? 8 : 1) visit(row, k);
    }
  }
};

// The operands that one thread brings to wgmma.
struct WgmmaSlot {
  float* d;
  const uint32_t* a_registers;  // or null
  uint64_t a, b;
  bool accumulate;

  bool same(const WgmmaSlot& other) const {
    return a == other.a && b == other.b && accumulate == other.accumulate;
  }
};

// Of the product of a warpgroup what a thread has.
template <int kN>
SIMT_ARITHMETIC void wgmma_values(const float (&product)[64][kN], int thread, float (&d)[kN / 2]) {
  for (int i = 0; i < kN / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    d[i] = product[row][i / 4 * 8 + thread % 4 * 2 + i % 2];
  }
}

template <class T, int kN, lora_ext::arch::Major kMajorA, lora_ext::arch::Major kMajorB>
void run_wgmma(const Block& block, const Multiply& multiply) {
  static thread_local float a[64][16], b[16][kN], product[64][kN];
  if (multiply.a_in_registers) {
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      for (int i = 0; i < 4; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
        const int column = thread % 4 * 2 + i / 2 * 8;
        const uint32_t pair = multiply.threads[static_cast<size_t>(thread)].a[i];
        a[row][column] = lora_ext::first_of<T>(pair);
        a[row][column + 1] = lora_ext::second_of<T>(pair);
      }
    }
  } else {
    const Operand operand(multiply.a, kMajorA);
    operand.read<T>(block, 64, [](uint32_t row, uint32_t k, float value) { a[row][k] = value; });
  }
  const Operand operand(multiply.b, kMajorB);
  operand.read<T>(block, kN,
                  [](uint32_t column, uint32_t k, float value) { b[k][column] = value; });
  multiply_matrices(a, b, product);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    float* d = multiply.threads[static_cast<size_t>(thread)].d;
    float own[kN / 2];
    wgmma_values(product, thread, own);
    for (int i = 0; i < kN / 2; ++i) d[i] = (multiply.accumulate ? d[i] : 0.0f) + own[i];
  }
}

template <class T, int kN, lora_ext::arch::Major kMajorA, lora_ext::arch::Major kMajorB>
void issue_wgmma(WgmmaSlot slot) {
  static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0);
  block().warpgroup_operation("wgmma", &slot, [](const auto& slots) {
    Block& block = simt::block();
    const auto& first = *static_cast<const WgmmaSlot*>(slots[0]);
    Warpgroup& warpgroup = block.warpgroup();
    block.check(warpgroup.fenced, "wgmma: no wgmma_fence since the last wgmma_commit");
    Multiply multiply{.run = run_wgmma<T, kN, kMajorA, kMajorB>,
                      .a = first.a,
                      .b = first.b,
                      .accumulate = first.accumulate,
                      .a_in_registers = first.a_registers != nullptr,
                      .group = warpgroup.group,
                      .threads = {}};
    for (size_t thread = 0; thread < kWarpgroup; ++thread) {
      const auto& own = *static_cast<const WgmmaSlot*>(slots[thread]);
      block.check(own.same(first), "wgmma: threads of a warpgroup name different operands");
      multiply.threads[thread].d = own.d;
      // Taken here: registers that are overwritten before the product is done make ptxas wait.
      if (own.a_registers) std::copy_n(own.a_registers, 4, multiply.threads[thread].a);
    }
    if (!multiply.a_in_registers) Operand(first.a, kMajorA).check(64);
    Operand(first.b, kMajorB).check(kN);
    ++block.counts.wgmma;
    warpgroup.multiplies.push_back(multiply);
    if (block.options.multiplies == Completion::kEager) block.complete_multiply(warpgroup);
  });
}

}  // namespace simt

namespace lora_ext::arch {

inline void wgmma_fence() {
  simt::block().warpgroup_operation("wgmma_fence", nullptr,
                                    [](const auto&) { simt::block().warpgroup().fenced = true; });
}

inline void wgmma_commit() {
  simt::block().warpgroup_operation("wgmma_commit", nullptr, [](const auto&) {
    simt::block().warpgroup().fenced = false;
    ++simt::block().warpgroup().group;
  });
}

template <int kGroups>
inline void wgmma_wait() {
  simt::block().warpgroup_operation("wgmma_wait", nullptr, [](const auto&) {
    simt::Warpgroup& warpgroup = simt::block().warpgroup();
    while (!warpgroup.multiplies.empty() &&
           warpgroup.multiplies.front().group + kGroups < warpgroup.group) {
      simt::block().complete_multiply(warpgroup);
    }
  });
}

// Of compilers for GPUs.
template <int kCount>
inline void wgmma_fence_sums(float (&)[kCount]) {}

// d [64, kN] (+)= A [64, 16] B [16, kN], both in shared memory.
template <class T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
inline void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::issue_wgmma<T, kN, kMajorA, kMajorB>({d, nullptr, a, b, accumulate});
}

// The same with A in registers, as mma_m16n8k16 holds it, 16 rows in each warp.
template <class T, int kN, Major kMajorB = Major::kK>
inline void wgmma(float (&d)[kN / 2], const FragmentA& a, uint64_t b, bool accumulate) {
  simt::issue_wgmma<T, kN, Major::kK, kMajorB>({d, a, 0, b, accumulate});
}

}  // namespace lora_ext::arch
