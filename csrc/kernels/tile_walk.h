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

// Tile `index` of rows x columns of them. Bands of so many rows are walked column by column: blocks
// that run at the same time share as much of A and B as fits L2, about a square of the result
// (on 132 multiprocessors 16 tiles of 128 rows by 8 of 256 columns).
struct TileIndex {
  int row, column;
};
constexpr int kBand = 16;  // rows of tiles
LORA_EXT_HOST_DEVICE TileIndex tile_at(int index, int rows, int columns, int band) {
  const int first = index / (band * columns) * band;
  const int height = rows - first < band ? rows - first : band;
  const int in_band = index - first * columns;
  return {first + in_band % height, in_band / height};
}

// A cluster stays for all its tiles: from its own number on every so many-th, as many as there are
// clusters. Its blocks have the same columns, and rows of tiles one below the other: where their
// number is no multiple of the cluster's size, some have tiles below the last row. No result that
// fits a GPU has 2^31 tiles. `columns` are of tiles: of one result, or of several of the same rows
// beside each other.
template <class Shape>
struct TileWalk {
  int size, rank;     // of the cluster, and of this block in it
  int clusters;       // of the grid
  int rows, columns;  // of tiles, those of a cluster as one
  int index;

  LORA_EXT_DEVICE TileWalk(int64_t M, int columns, int size, int rank)
      : size(size),
        rank(rank),
        clusters(static_cast<int>(gridDim.x) / size),
        rows(static_cast<int>((row_tiles<Shape>(M) + size - 1) / size)),
        columns(columns),
        index(static_cast<int>(blockIdx.x) / size) {}

  // Of a cluster.
  static int64_t tiles(int64_t M, int64_t columns, int size) {
    return (row_tiles<Shape>(M) + size - 1) / size * columns;
  }

  LORA_EXT_DEVICE bool goes_on() const { return index < rows * columns; }
  LORA_EXT_DEVICE void advance() { index += clusters; }
  LORA_EXT_DEVICE TileCorner tile() const {
    const TileIndex at = tile_at(index, rows, columns, kBand / size);
    return {int64_t{at.row * size + rank} * Shape::kM, int64_t{at.column} * Shape::kN};
  }
};

}  // namespace sm90

}  // namespace lora_ext
