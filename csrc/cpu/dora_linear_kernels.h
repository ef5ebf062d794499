// The vector kernels of dora_linear: products with the elements of x that dropout drops. Leading
// dimensions are in elements.
#pragma once

#include <cstdint>

#include "dropout_kernels.h"

namespace lora_ext {

// W [N, K], base type, with steps between its rows and its columns; one of them is 1.
struct StridedWeight {
  const void* data;
  int64_t N, K, row, column;
};

// Where dropout drops in a chunk of rows: of row first + i, in block b of 128 columns, the entries
// from starts[b * rows + i] to starts[b * rows + i + 1].
struct DroppedLists {
  int64_t first, rows;
  const int32_t* starts;   // [blocks * rows + 1]
  const uint8_t* columns;  // in the block
  void* values;            // compute type: the dropped elements of x, or sums of backward
};

struct DoraLinearForwardArgs {
  StridedWeight weight;
  const void* scale_minus_1;  // [N] compute type
  double survivor;            // 1 / (1 - p)
  void* z;                    // [M, N] base type, x W^T; v is written in its place
  void* y;                    // [M, N] base type, added to
};

struct DoraLinearBackwardArgs {
  StridedWeight weight;
  const void* u;   // [M, N] base type
  const void* dy;  // [M, N] base type, rows lddy apart
  int64_t lddy;
  void* dx;  // [M, K] base type, added to
};

struct DoraLinearKernels {
  int64_t panel_width;  // outputs that one call of forward makes
  // Bytes of scratch that one call of forward or backward needs, for a chunk of so many rows.
  int64_t (*scratch_bytes)(int64_t rows);
  // The lists of rows [begin, end) of a chunk of `rows` rows from `first` on, in two steps: their
  // lengths, and what keep [rows, 8 * blocks] says; then, at the starts, what is in them, values
  // only if x [M, K], rows ldx apart, is given.
  void (*count)(const DropoutArgs& dropout, int64_t K, int64_t first, int64_t rows, int64_t begin,
                int64_t end, uint16_t* keep, int32_t* counts);
  void (*list)(const void* x, int64_t ldx, int64_t K, int64_t first, int64_t rows, int64_t begin,
               int64_t end, const uint16_t* keep, const int32_t* starts, uint8_t* columns,
               void* values);
  // With x_d the dropped elements of x: v = (z - x_d W^T) / (1 - p) and y += z + (scale - 1) v, for
  // one panel of outputs.
  void (*forward)(const DoraLinearForwardArgs&, const DroppedLists&, int64_t panel, void* scratch);
  // dx -= (u - dy) W where x was dropped, for blocks [first, last) of columns of dx.
  void (*backward)(const DoraLinearBackwardArgs&, const DroppedLists&, int64_t first_block,
                   int64_t last_block, void* scratch);
};

}  // namespace lora_ext
