// Rows of a matrix as warps walk them: spans of 256 columns, 8 for each lane.
#pragma once

#include <stdexcept>

#include "arch/arch.h"
#include "elementwise.h"
#include "lora_linear.h"

namespace lora_ext {

constexpr int kSpan = 256;         // columns
constexpr int kEach = kSpan / 32;  // of a lane
constexpr int kRowWarps = 8;       // of a block that walks rows
constexpr int kRowThreads = kRowWarps * 32;

// 8 elements as they lie in memory.
template <class T>
struct Raw {
  arch::Words words[kEach * sizeof(T) / sizeof(arch::Words)];
};

template <class T>
LORA_EXT_DEVICE void widen(const Raw<T>& raw, float (&out)[kEach]) {
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if constexpr (sizeof(T) == sizeof(float)) {
      out[e] = bits_to_float(raw.words[e / 4].word[e % 4]);
    } else {
      const uint32_t pair = raw.words[0].word[e / 2];
      out[e] = e % 2 == 0 ? first_of<T>(pair) : second_of<T>(pair);
    }
  }
}

// A span of the rows of a matrix of T, and of what lies beside it, column for column. kAligned: its
// rows begin at multiples of 16 bytes, and so they end; then a lane has columns that are
// neighbours, and reads 16 bytes at once. Else they are 32 apart, so that what the lanes read is.
template <class T, bool kAligned>
struct Span {
  int lane;
  int64_t left;  // columns that the matrix has from the span's first one on

  // The lane's element e. Elements 0 to 3 are neighbours if kAligned, and so are 4 to 7.
  LORA_EXT_DEVICE int column(int e) const {
    if constexpr (!kAligned) return lane + 32 * e;
    return sizeof(T) == 2 ? lane * kEach + e : e / 4 * (kSpan / 2) + lane * 4 + e % 4;
  }
  LORA_EXT_DEVICE bool inside(int e) const { return column(e) < left; }

  // The lane's elements of `row`, the span's first element there; zero beyond the matrix.
  template <class E>
  LORA_EXT_DEVICE Raw<E> load_raw(const E* row) const {
    Raw<E> raw{};
    constexpr int kVector = 16 / sizeof(E);
    static_assert(sizeof(E) == sizeof(T) || sizeof(E) == sizeof(float), "neighbours enough");
#pragma unroll
    for (int e = 0; e < kEach; e += kAligned ? kVector : 1) {
      if (!inside(e)) continue;
      arch::Words& words = raw.words[e / kVector];
      if constexpr (kAligned) {
        words = arch::load_16(row + column(e));
      } else if constexpr (sizeof(E) == sizeof(float)) {
        const E value = row[column(e)];  // memcpy of memory would be byte by byte
        memcpy(&words.word[e % kVector], &value, sizeof(E));
      } else {
        words.word[e % kVector / 2] |= uint32_t{row[column(e)].bits} << e % 2 * 16;
      }
    }
    return raw;
  }
  template <class E>
  LORA_EXT_DEVICE void load(const E* row, float (&out)[kEach]) const {
    widen(load_raw(row), out);
  }

  // Rounds; nothing beyond the matrix is written.
  template <class E>
  LORA_EXT_DEVICE void store(E* row, const float (&values)[kEach]) const {
    constexpr int kVector = 16 / sizeof(E);
#pragma unroll
    for (int e = 0; e < kEach; e += kAligned ? kVector : 1) {
      if (!inside(e)) continue;
      if constexpr (kAligned) {
        arch::Words words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (sizeof(E) == sizeof(float)) {
            memcpy(&words.word[i], &values[e + i], sizeof(float));
          } else {
            words.word[i] = pack_pair<E>(values[2 * i], values[2 * i + 1]);
          }
        }
        arch::store_16(row + column(e), words);
      } else {
        row[column(e)] = rounded<E>(values[e]);
      }
    }
  }
};

// Whether rows of `columns` elements that are `stride` apart are made of whole 16 bytes.
template <class T>
bool rows_aligned(const T* data, int64_t columns, int64_t stride) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % kVector == 0 &&
         stride % kVector == 0;
}
template <class T>
bool rows_aligned(const Matrix<T>& matrix) {
  // One row may have any stride.
  return rows_aligned(matrix.data, matrix.columns, matrix.rows > 1 ? matrix.stride : 0);
}

// The tile of a block, of `columns` tiles side by side, in a flat grid. It has fewer than 2^31
// blocks: a division of 64 bits would take as many instructions as the rest of a small kernel.
struct FlatTile {
  int64_t row, column;

  LORA_EXT_DEVICE explicit FlatTile(int64_t columns) {
    const unsigned block = blockIdx.x, wide = static_cast<unsigned>(columns);
    row = block / wide, column = block % wide;
  }
};

// Blocks in the one dimension of a grid that does not end at 65,535.
inline dim3 flat_grid(int64_t blocks) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  if (blocks > kMost) throw std::runtime_error("lora_ext: a matrix has more tiles than a grid");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace lora_ext
