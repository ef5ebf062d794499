// Which tiles of the result a block of the product makes, and in which order. The kernels' bodies
// and their launchers know it from here alone.
#pragma once

#include "arch/arch.h"

namespace lora_ext {

// The first row and column of a tile.
struct TileCorner {
  int64_t m, n;
};

template <class Shape>
LORA_EXT_HOST_DEVICE int64_t row_tiles(int64_t M) {
  return (M + Shape::kM - 1) / Shape::kM;
}
template <class Shape>
LORA_EXT_HOST_DEVICE int64_t column_tiles(int64_t N) {
  return (N + Shape::kN - 1) / Shape::kN;
}

namespace sm80 {

// One tile a block, along the columns first: blocks that run together share rows of A. The grid has
// one dimension, since the others end at 65,535.
template <class Shape>
struct TileWalk {
  static int64_t tiles(int64_t M, int64_t N) {
    return row_tiles<Shape>(M) * column_tiles<Shape>(N);
  }

  LORA_EXT_DEVICE static TileCorner tile(int64_t N) {
    const auto columns = static_cast<unsigned>(column_tiles<Shape>(N));
    return {int64_t{blockIdx.x / columns} * Shape::kM, int64_t{blockIdx.x % columns} * Shape::kN};
  }
};

}  // namespace sm80

namespace sm90 {

// Tile `index` of rows x columns of them. Bands of kBand rows are walked column by column: blocks
// that run at the same time share as much of A and B as fits L2, about a square of the result
// (on 132 multiprocessors 16 tiles of 128 rows by 8 of 256 columns).
struct TileIndex {
  int64_t row, column;
};
constexpr int64_t kBand = 16;
LORA_EXT_HOST_DEVICE TileIndex tile_at(int64_t index, int64_t rows, int64_t columns) {
  const int64_t first = index / (kBand * columns) * kBand;
  const int64_t height = rows - first < kBand ? rows - first : kBand;
  const int64_t in_band = index - first * columns;
  return {first + in_band % height, in_band / height};
}

// A block stays for all its tiles: every gridDim.x-th from its own number on.
template <class Shape>
struct TileWalk {
  int64_t rows, columns;  // of tiles
  int64_t index;

  LORA_EXT_DEVICE TileWalk(int64_t M, int64_t N)
      : rows(row_tiles<Shape>(M)), columns(column_tiles<Shape>(N)), index(blockIdx.x) {}

  static int64_t tiles(int64_t M, int64_t N) {
    return row_tiles<Shape>(M) * column_tiles<Shape>(N);
  }

  LORA_EXT_DEVICE bool goes_on() const { return index < rows * columns; }
  LORA_EXT_DEVICE void advance() { index += gridDim.x; }
  LORA_EXT_DEVICE TileCorner tile() const {
    const TileIndex at = tile_at(index, rows, columns);
    return {at.row * Shape::kM, at.column * Shape::kN};
  }
};

}  // namespace sm90

}  // namespace lora_ext
