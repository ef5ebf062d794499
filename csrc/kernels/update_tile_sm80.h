// The tile of update_tile.h by tensor cores, for 16-bit bases: W + scaling * L R, 32 x 256 elements
// of a block, 16 x 64 of a warp. Of these a lane has 8 neighbouring columns in each of two rows and
// two halves: 16 bytes of W, four times. The columns of R are permuted on their way to shared
// memory, so that the sums which mma.sync leaves in a lane are those.
#pragma once

#include "span.h"

namespace lora_ext {

// TA: the adapters' type. A float is two bf16, whatever the base is: what rounding to the first
// leaves, and of that the same again is neglected.
template <class TA>
struct UpdateTileSm80 {
  using Part = std::conditional_t<sizeof(TA) == sizeof(float), Bf16, TA>;
  static constexpr int kTerms = sizeof(TA) == sizeof(float) ? 2 : 1;
  static constexpr int kRows = 32, kColumns = kSpan, kRanks = 32;
  static constexpr int kWarpRows = 16, kWarpColumns = 64, kHalf = 32;
  static constexpr int kRowGroups = kRows / kWarpRows, kColumnGroups = kColumns / kWarpColumns;
  static_assert(kRowGroups * kColumnGroups == kRowWarps, "a warp for each part");
  static constexpr int kSlots = 4;  // of a lane: half * 2 + row / 8, of 8 columns each
  // Elements from a row of L to the next, and of R: 16 bytes more than are used, so that the eight
  // rows of a matrix of ldmatrix lie in different banks.
  static constexpr int kLeft = kRanks + 8, kRight = kColumns + 8;
  static constexpr int kLeftBytes = kRows * kLeft * 2, kRightBytes = kRanks * kRight * 2;
  static constexpr int kSharedBytes = kTerms * (kLeftBytes + kRightBytes);
  static_assert(kSharedBytes <= 48 * 1024, "two blocks of a multiprocessor, without asking");
  using Sums = float[kSlots][kEach];

  Part *left, *right;  // [kTerms, kRows, kLeft], [kTerms, kRanks, kRight]
  int row, column;     // of the warp's part in the tile
  int lane;

  LORA_EXT_DEVICE UpdateTileSm80(uint8_t* shared, int thread)
      : left(reinterpret_cast<Part*>(shared)),
        right(reinterpret_cast<Part*>(shared + kTerms * kLeftBytes)),
        row(thread / 32 / kColumnGroups * kWarpRows),
        column(thread / 32 % kColumnGroups * kWarpColumns),
        lane(thread % 32) {}

  // Of a slot, in the tile.
  LORA_EXT_DEVICE int row_of(int slot) const { return row + lane / 4 + slot % 2 * 8; }
  LORA_EXT_DEVICE int first_column_of(int slot) const {
    return column + slot / 2 * kHalf + lane % 4 * kEach;
  }

  // Where a column of the tile lies in a rank of `right`: of each 32 the pairs (0, 1), (8, 9), (16,
  // 17), (24, 25) are the first eight, which mma.sync gives to four lanes.
  LORA_EXT_DEVICE static unsigned place(unsigned c) {
    return c / kHalf * kHalf + c % kEach / 2 * 8 + c % kHalf / kEach * 2 + c % 2;
  }

  static LORA_EXT_DEVICE float rest_of(float value, Part near) {
    const float rest = value - to_float(near);
    return rest == rest ? rest : 0.0f;  // of infinity nothing is left
  }
  // The remainders lie as far behind the values as `bytes`.
  LORA_EXT_DEVICE static void put(Part* out, int bytes, float value) {
    *out = rounded<Part>(value);
    if constexpr (kTerms == 2) out[bytes / 2] = rounded<Part>(rest_of(value, *out));
  }
  LORA_EXT_DEVICE static void put_pair(Part* out, int bytes, float first, float second) {
    const uint32_t pair = pack_pair<Part>(first, second);
    memcpy(out, &pair, sizeof(pair));
    if constexpr (kTerms == 2) {
      const float rest = rest_of(first, Part{static_cast<uint16_t>(pair)});
      const uint32_t rests =
          pack_pair<Part>(rest, rest_of(second, Part{static_cast<uint16_t>(pair >> 16)}));
      memcpy(out + bytes / 2, &rests, sizeof(rests));
    }
  }

  // L [rows, rank] from row `L` on, for ranks first to first + ranks; zeros up to 16 ranks, or 32.
  LORA_EXT_DEVICE void fill_left(const TA* L, int rank, int first, int ranks, int rows,
                                 int thread) {
    const int width = ranks > 16 ? 32 : 16, k = thread % width, step = kRowThreads / width;
    constexpr int kAtOnce = kRows * 32 / kRowThreads;  // loads, before the first is needed
    float values[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = thread / width + n * step;
      values[n] = k < ranks && i < rows ? to_float(L[i * rank + first + k]) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = thread / width + n * step;
      if (i < kRows) put(left + i * kLeft + k, kLeftBytes, values[n]);
    }
  }

  // R: `row_of(k)` is the span's first element of rank k.
  template <class T, bool kAligned, class RowOf>
  LORA_EXT_DEVICE void fill_right(const Span<T, kAligned>& span, int ranks, int thread,
                                  const RowOf& row_of) {
    const int padded = ranks > 16 ? 32 : 16;
    for (int k = thread / 32; k < padded; k += kRowWarps) {
      float values[kEach] = {};
      if (k < ranks) span.load(row_of(k), values);
      Part* const out = right + k * kRight;
#pragma unroll
      for (int e = 0; e < kEach; e += kAligned ? 2 : 1) {
        Part* const at = out + place(static_cast<unsigned>(span.column(e)));
        if constexpr (kAligned) {
          put_pair(at, kRightBytes, values[e], values[e + 1]);
        } else {
          put(at, kRightBytes, values[e]);
        }
      }
    }
  }

  // sums += L R of the warp's part, as mma.sync orders them: eight columns of `right` each.
  LORA_EXT_DEVICE void multiply(arch::FragmentC (&sums)[8], int ranks) const {
    const Part* const own_left = left + (row + lane % 16) * kLeft + lane / 16 * 8;
    const Part* const own_right = right + lane % 16 * kRight + column + lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < ranks; k += 16) {
      arch::FragmentA a[kTerms];
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        arch::ldmatrix_x4<false>(a[term],
                                 arch::shared_address(own_left + term * (kLeftBytes / 2) + k));
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          uint32_t b[4];
          arch::ldmatrix_x4<true>(b, arch::shared_address(own_right + term * (kRightBytes / 2) +
                                                          k * kRight + pair * 16));
          const arch::FragmentB first = {b[0], b[1]}, second = {b[2], b[3]};
#pragma unroll
          for (int of_left = 0; of_left < kTerms - term; ++of_left) {
            arch::mma_m16n8k16<Part>(sums[pair * 2], a[of_left], first);
            arch::mma_m16n8k16<Part>(sums[pair * 2 + 1], a[of_left], second);
          }
        }
      }
    }
  }

  // W's elements of the lane, `weight` being the tile's first one; zero beyond the matrix.
  template <bool kAligned, class T>
  LORA_EXT_DEVICE Raw<T> load(const T* weight, int64_t stride, int slot, int rows,
                              int64_t columns) const {
    static_assert(sizeof(T) == 2);
    Raw<T> raw{};
    const int at = first_column_of(slot);
    if (row_of(slot) >= rows) return raw;
    const T* const first = weight + row_of(slot) * stride + at;
    if constexpr (kAligned) {
      if (at < columns) raw.words[0] = arch::load_16(first);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (at + e < columns) raw.words[0].word[e / 2] |= uint32_t{first[e].bits} << e % 2 * 16;
      }
    }
    return raw;
  }
};

}  // namespace lora_ext
