// Tiles of 16-bit matrices in shared memory, and the mma.sync operands that warps read from them.
#pragma once

#include "arch/arch.h"
#include "lora_linear_passes.h"

namespace lora_ext::sm80 {

// That every GPU from sm_80 on gives a block which asks for them: sm_86, sm_89 and sm_120 no more.
constexpr int kLeastSharedBytes = 99 * 1024;

// Of a multiprocessor, for __launch_bounds__: without a number ptxas spills registers to fit more
// blocks than shared memory lets in.
constexpr int kLeastBlocks = 1;

// Blocks for every multiprocessor of the device to have about two.
inline int64_t wanted_blocks() { return 2 * int64_t{arch::multiprocessors()}; }

// kRows x kColumns elements, row by row, in chunks of 8 elements (16 bytes). The chunks are
// permuted by the number of their row, so that the eight rows of a matrix of ldmatrix lie in
// different banks.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kBytes = kRows * kColumns * 2;
  static constexpr int kChunks = kColumns / 8;
  static_assert(kColumns % 16 == 0 && (kChunks >= 8 || 8 % kChunks == 0), "chunks tile the banks");

  LORA_EXT_DEVICE static uint32_t offset(int row, int chunk) {
    constexpr int kRowsPerTurn = kChunks >= 8 ? 1 : 8 / kChunks;  // rows in one pass over the banks
    constexpr int kPermuted = kChunks >= 8 ? 8 : kChunks;
    const unsigned turn = static_cast<unsigned>(row) / kRowsPerTurn % kPermuted;
    return static_cast<uint32_t>(row * kColumns * 2 + ((static_cast<unsigned>(chunk) ^ turn) << 4));
  }

  // What a thread copies of the tile at (row, column) of a matrix, and of those that follow: its
  // chunk of every so many rows. Numbers are of 32 bits, as all rows and columns are.
  template <int kThreads, class T>
  class Copies {
   public:
    LORA_EXT_DEVICE Copies(const Matrix<T>& matrix, int64_t row, int64_t column, int thread)
        : first_(thread / kChunks),
          rows_(static_cast<int>(matrix.rows - row) - first_),
          columns_(static_cast<int>(matrix.columns - column) - thread % kChunks * 8),
          to_(offset(first_, thread % kChunks)),
          stride_(matrix.rows > 1 ? matrix.stride : 0),  // a single row's may be any
          source_(matrix.data + (row + first_) * stride_ + column + thread % kChunks * 8) {}

    // Starts; zero outside of the matrix, of which nothing is read there. Only the last columns may
    // be a part of a chunk, whose bytes are counted.
    LORA_EXT_DEVICE void start(uint32_t shared) const {
      if (columns_ >= 8) {
        start(shared, [](bool inside) { return inside ? 16 : 0; });
      } else {
        const int bytes = columns_ > 0 ? columns_ * 2 : 0;
        start(shared, [&](bool inside) { return inside ? bytes : 0; });
      }
    }

    LORA_EXT_DEVICE void advance_columns() { source_ += kColumns, columns_ -= kColumns; }
    LORA_EXT_DEVICE void advance_rows() { source_ += kRows * stride_, rows_ -= kRows; }

   private:
    static_assert(kThreads % (8 * kChunks) == 0, "the rows of a thread have the same permutation");
    static constexpr int kApart = kThreads / kChunks;  // rows

    template <class Bytes>
    LORA_EXT_DEVICE void start(uint32_t shared, const Bytes& bytes) const {
      const T* from = source_;
#pragma unroll
      for (int i = 0; i < (kRows + kApart - 1) / kApart; ++i) {
        if (kRows % kApart != 0 && first_ + i * kApart >= kRows) break;
        arch::cp_async_16(shared + to_ + i * kApart * kColumns * 2, from,
                          bytes(i * kApart < rows_));
        from += kApart * stride_;
      }
    }

    int first_, rows_, columns_;  // what the matrix has from this thread's first element on
    uint32_t to_;
    int64_t stride_;
    const T* source_;
  };

  // Starts to copy the tile at (row, column) of the matrix; zero outside of it. `thread` of
  // kThreads.
  template <int kThreads, class T>
  LORA_EXT_DEVICE static void load(uint32_t shared, const Matrix<T>& matrix, int64_t row,
                                   int64_t column, int thread) {
    Copies<kThreads, T>(matrix, row, column, thread).start(shared);
  }

  // Starts to copy these columns of the rows of the matrix that `list` names, the first `count` of
  // the tile; zero below them. The matrix is aligned.
  template <int kThreads, class T>
  LORA_EXT_DEVICE static void gather(uint32_t shared, const Matrix<T>& matrix, const int* list,
                                     int count, int64_t column, int thread) {
    static_assert(kThreads % kChunks == 0, "a thread copies one chunk of its rows");
    constexpr int kApart = kThreads / kChunks;
    const int first = thread / kChunks, chunk = thread % kChunks;
    const int64_t left = matrix.columns - column - chunk * 8;
    const int bytes = left >= 8 ? 16 : left > 0 ? static_cast<int>(left) * 2 : 0;
    const T* const source = matrix.data + column + chunk * 8;
#pragma unroll
    for (int i = 0; i < (kRows + kApart - 1) / kApart; ++i) {
      const int row = first + i * kApart;
      if (kRows % kApart != 0 && row >= kRows) break;
      const bool inside = row < count;
      arch::cp_async_16(shared + offset(row, chunk),
                        inside ? source + list[row] * matrix.stride : source, inside ? bytes : 0);
    }
  }

  // As load, of matrices that are not aligned: element by element, finished when it returns.
  template <int kThreads, class T>
  LORA_EXT_DEVICE static void load_elements(uint8_t* shared, const Matrix<T>& matrix, int64_t row,
                                            int64_t column, int thread) {
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, chunk = i % kChunks;
      auto* out = reinterpret_cast<T*>(shared + offset(r, chunk));
      for (int e = 0; e < 8; ++e) {
        const int64_t c = column + chunk * 8 + e;
        const bool inside = row + r < matrix.rows && c < matrix.columns;
        out[e] = inside ? matrix.data[(row + r) * matrix.stride + c] : T{0};
      }
    }
  }
};

// Which rows of a matrix the tiles of a kernel are made of: as they lie there.
struct NeighbouringRows {
  static constexpr bool kListed = false;

  // Of the tiles' row, in the call: what dropout draws by.
  LORA_EXT_DEVICE int64_t number(int64_t row) const { return row; }

  template <class Tile, int kThreads, class T>
  LORA_EXT_DEVICE void load(uint8_t* shared, const Matrix<T>& matrix, bool aligned, int64_t row,
                            int64_t column, int thread) const {
    if (aligned) {
      Tile::template load<kThreads>(arch::shared_address(shared), matrix, row, column, thread);
    } else {
      Tile::template load_elements<kThreads>(shared, matrix, row, column, thread);
    }
  }
};

// Those that a list names, of an aligned matrix whose `rows` are their count.
struct ListedRows {
  static constexpr bool kListed = true;
  const int* list;  // of whole tiles

  LORA_EXT_DEVICE int64_t number(int64_t row) const { return list[row]; }

  template <class Tile, int kThreads, class T>
  LORA_EXT_DEVICE void load(uint8_t* shared, const Matrix<T>& matrix, bool, int64_t row,
                            int64_t column, int thread) const {
    Tile::template gather<kThreads>(arch::shared_address(shared), matrix, list + row,
                                    static_cast<int>(matrix.rows - row), column, thread);
  }
};

// Starts to copy both parts of a matrix, the tile of the remainder behind that of the value.
template <class Tile, int kThreads, class T>
LORA_EXT_DEVICE void load_split(uint32_t shared, const Split<T>& matrix, int64_t row,
                                int64_t column, int thread) {
  Matrix<T> part = matrix.value;
  Tile::template load<kThreads>(shared, part, row, column, thread);
  if (matrix.remainder) {
    part.data = matrix.remainder;
    Tile::template load<kThreads>(shared + Tile::kBytes, part, row, column, thread);
  }
}

// Operand A [16, 16] of mma_m16n8k16 at (row, column) of a tile of rows of A.
template <class Tile>
LORA_EXT_DEVICE void load_a(arch::FragmentA& a, uint32_t tile, int row, int column, int lane) {
  arch::ldmatrix_x4<false>(a, tile + Tile::offset(row + lane % 16, column / 8 + lane / 16));
}

// The same of a tile that holds A transposed: (column, row) there.
template <class Tile>
LORA_EXT_DEVICE void load_a_transposed(arch::FragmentA& a, uint32_t tile, int row, int column,
                                       int lane) {
  const int matrix = lane / 8;
  arch::ldmatrix_x4<true>(
      a, tile + Tile::offset(column + lane % 8 + matrix / 2 * 8, row / 8 + matrix % 2));
}

// Two operands B [16, 8], side by side, at (k, column) of a tile of B transposed: rows are columns
// of B, as those of a weight [N, K] are.
template <class Tile>
LORA_EXT_DEVICE void load_b(arch::FragmentB (&b)[2], uint32_t tile, int k, int column, int lane) {
  uint32_t out[4];
  arch::ldmatrix_x4<false>(
      out, tile + Tile::offset(column + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
  b[0][0] = out[0], b[0][1] = out[1], b[1][0] = out[2], b[1][1] = out[3];
}

// The same of a tile whose rows are rows of B.
template <class Tile>
LORA_EXT_DEVICE void load_b_rows(arch::FragmentB (&b)[2], uint32_t tile, int k, int column,
                                 int lane) {
  uint32_t out[4];
  arch::ldmatrix_x4<true>(out, tile + Tile::offset(k + lane % 16, column / 8 + lane / 16));
  b[0][0] = out[0], b[0][1] = out[1], b[1][0] = out[2], b[1][1] = out[3];
}

}  // namespace lora_ext::sm80
