// The vector kernels of column_scale. Leading dimensions are in elements.
#pragma once

#include <cstdint>

namespace lora_ext {

struct ColumnScaleArgs {
  int64_t N;
  const void* z;  // [M, N] base type, rows ldz apart
  int64_t ldz;
  const void* scale;  // [N] compute type
  const void* bias;   // [N] compute type, or null
  void* y;            // [M, N] base type, written
  bool adds;          // to y
};

struct ColumnScaleBackwardArgs {
  int64_t N;
  const void* dy;  // [M, N] base type, rows lddy apart
  int64_t lddy;
  const void* z;  // [M, N] base type, rows ldz apart; may be null if dscale is not wanted
  int64_t ldz;
  const void* scale;  // [N] compute type
  void* dz;           // [M, N] base type, written, or null
};

struct ColumnScaleKernels {
  // Rows [begin, end) of y = z * scale + bias, or of y += that.
  void (*forward_rows)(const ColumnScaleArgs&, int64_t begin, int64_t end);
  // Rows [begin, end) of dz = dy * scale; the sums over these rows of dy * z and of dy are added to
  // dscale and dbias [N], in the compute type; either may be null. Scratch: 2 N compute elements.
  void (*backward_rows)(const ColumnScaleBackwardArgs&, int64_t begin, int64_t end, void* dscale,
                        void* dbias, void* scratch);
};

}  // namespace lora_ext
