// The tile of weight_norm: sums of squares of W + scaling * B A over a block's 32 rows and 256
// columns, without tensor cores, and with them.
#pragma once

#include "sum_parts.h"
#include "update_tile.h"
#include "update_tile_sm80.h"
#include "weight_norm.h"

namespace lora_ext {

template <class T, class TA>
struct WeightNormParams {
  WeightNormCall<T, TA> call;
  int64_t column_tiles;
  float* parts;  // [column tiles, N], or by column [row tiles, K]
};

// Where a block's tile lies.
struct NormTile {
  int64_t row_tile, column_tile;
  int64_t first_row, column;  // its first ones
  int rows;                   // that the matrix has there, up to all
  int64_t left;               // columns that it has from there on

  template <class T>
  LORA_EXT_DEVICE NormTile(const Matrix<T>& weight, const FlatTile& tile)
      : row_tile(tile.row),
        column_tile(tile.column),
        first_row(row_tile * UpdateTile::kRows),
        column(column_tile * UpdateTile::kColumns),
        rows(at_most(weight.rows - first_row, UpdateTile::kRows)),
        left(weight.columns - column) {}
};

// Each in float, so for every type.
template <bool kAligned, class T, class TA>
LORA_EXT_DEVICE void norms_in_lanes(const WeightNormParams<T, TA>& params, uint8_t* shared) {
  using Tile = UpdateTile;
  const WeightNormCall<T, TA>& call = params.call;
  const Matrix<T>& weight = call.weight;
  const NormTile at(weight, FlatTile(params.column_tiles));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = warp * Tile::kWarpRows;  // this warp's first
  const Span<T, kAligned> span{lane, at.left};

  Raw<T> raw[Tile::kWarpRows] = {};
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    if (row + i >= at.rows) continue;
    raw[i] = span.load_raw(weight.data + (at.first_row + row + i) * weight.stride + at.column);
  }
  const TA* const B = call.lora_B + at.first_row * call.rank;
  Tile tile(shared);
  Tile::Sums sums;
  tile.add(sums, raw, call.rank, warp, lane, [&](int first, int ranks) {
    const TA* const A = call.lora_A + first * weight.columns + at.column;
    tile.fill_right(span, ranks, thread, [&](int rank) { return A + rank * weight.columns; });
    Tile::fill_by_rank<Tile::kRows, Tile::kLeft>(
        tile.left, ranks, thread, [](int item) { return item; },
        [&](int item, int rank) {
          const int n = item < at.rows ? item : at.rows - 1;
          return call.scaling * to_float(B[n * call.rank + first + rank]);
        });
  });

  // Beyond the matrix there may be infinity times zero.
  if (!call.by_column) {
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      float square = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (span.inside(e)) square += sums[i][e] * sums[i][e];
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        square += __shfl_xor_sync(0xFFFFFFFFu, square, distance);
      }
      if (lane == i) own = square;
    }
    if (lane < Tile::kWarpRows && row + lane < at.rows) {
      params.parts[at.column_tile * weight.rows + at.first_row + row + lane] = own;
    }
    return;
  }
  __syncthreads();  // the factors are read: the place is for sums over each warp's rows
  auto* const of_warps = reinterpret_cast<float*>(shared);  // [kRowWarps, kEach, 32]
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      if (row + i < at.rows) square += sums[i][e] * sums[i][e];
    }
    of_warps[(warp * kEach + e) * 32 + lane] = square;
  }
  __syncthreads();
  // Warp w adds elements w of all lanes.
  float square = 0.0f;
#pragma unroll
  for (int w = 0; w < kRowWarps; ++w) square += of_warps[(w * kEach + warp) * 32 + lane];
  if (span.inside(warp)) {
    params.parts[at.row_tile * weight.columns + at.column + span.column(warp)] = square;
  }
}

// By tensor cores, for 16-bit bases.
template <bool kAligned, class T, class TA>
LORA_EXT_DEVICE void norms_by_mma(const WeightNormParams<T, TA>& params, uint8_t* shared) {
  using Tile = UpdateTileSm80<TA>;
  const WeightNormCall<T, TA>& call = params.call;
  const Matrix<T>& weight = call.weight;
  const NormTile at(weight, FlatTile(params.column_tiles));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const Span<T, kAligned> span{lane, at.left};
  Tile tile(shared, thread);

  const T* const W = weight.data + at.first_row * weight.stride + at.column;
  Raw<T> raw[Tile::kSlots];
#pragma unroll
  for (int slot = 0; slot < Tile::kSlots; ++slot) {
    raw[slot] = tile.template load<kAligned>(W, weight.stride, slot, at.rows, at.left);
  }
  arch::FragmentC products[8] = {};
  for (int first = 0; first < call.rank; first += Tile::kRanks) {
    const int ranks = at_most(call.rank - first, Tile::kRanks);
    const TA* const A = call.lora_A + first * weight.columns + at.column;
    if (first > 0) __syncthreads();  // the ranks before are read
    tile.fill_left(call.lora_B + at.first_row * call.rank, call.rank, first, ranks, at.rows,
                   thread);
    tile.fill_right(span, ranks, thread, [&](int rank) { return A + rank * weight.columns; });
    __syncthreads();
    tile.multiply(products, ranks);
  }
  typename Tile::Sums sums;
#pragma unroll
  for (int slot = 0; slot < Tile::kSlots; ++slot) {
    widen(raw[slot], sums[slot]);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      sums[slot][e] += call.scaling * products[slot / 2 * 4 + e / 2][slot % 2 * 2 + e % 2];
    }
  }

  __syncthreads();  // the factors are read: the place is for sums over each warp's part
  auto* const of_parts = reinterpret_cast<float*>(shared);
  const int half_warp_rows = lane / 4, quarter = lane % 4;
  if (!call.by_column) {  // [kRows, kColumnGroups]
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      float square = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = half * 2 + eight;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int first =
              tile.first_column_of(slot);  // all eight are inside, or none, if aligned
          if (first + (kAligned ? 0 : e) < at.left) square += sums[slot][e] * sums[slot][e];
        }
      }
      square += __shfl_xor_sync(0xFFFFFFFFu, square, 1);
      square += __shfl_xor_sync(0xFFFFFFFFu, square, 2);
      const int row = tile.row + half_warp_rows + eight * 8;
      if (quarter == 0) {
        of_parts[row * Tile::kColumnGroups + tile.column / Tile::kWarpColumns] = square;
      }
    }
    __syncthreads();
    if (thread >= at.rows) return;
    float square = 0.0f;
#pragma unroll
    for (int part = 0; part < Tile::kColumnGroups; ++part) {
      square += of_parts[thread * Tile::kColumnGroups + part];
    }
    params.parts[at.column_tile * weight.rows + at.first_row + thread] = square;
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // [kRowGroups, kColumns]
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      float square = 0.0f;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const int slot = half * 2 + eight;
        if (tile.row_of(slot) < at.rows) square += sums[slot][e] * sums[slot][e];
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        square += __shfl_xor_sync(0xFFFFFFFFu, square, distance);
      }
      if (half_warp_rows == 0) {
        of_parts[tile.row / Tile::kWarpRows * Tile::kColumns + tile.first_column_of(half * 2) + e] =
            square;
      }
    }
  }
  __syncthreads();
  if (thread >= at.left) return;
  float square = 0.0f;
#pragma unroll
  for (int part = 0; part < Tile::kRowGroups; ++part) {
    square += of_parts[part * Tile::kColumns + thread];
  }
  params.parts[at.row_tile * weight.columns + at.column + thread] = square;
}

}  // namespace lora_ext
