// The vector kernels behind the CPU backend: one table per instruction set, one column per pair of
// storage types. Everything here is plain data, so that files compiled for different instruction
// sets share no inline code (see simd/types.h). Leading dimensions are in elements.
#pragma once

#include <cstdint>

#include "../common/dropout.h"

namespace lora_ext {

// Base and adapter storage type. The compute type is float, for F64 double.
enum class DtypePair { F64, F32, BF16, BF16_F32, F16, F16_F32 };
constexpr int kDtypePairs = 6;

// Without dropout the threshold keeps everything, the scale is 1, and nobody need look.
struct DropoutArgs {
  bool enabled;
  uint32_t threshold;
  double scale;
  DropoutRng rng;
};

struct ForwardArgs {
  int64_t M, K, N, r;  // M: of the whole call, on which sums of a row may depend; not on threads
  const void* x;       // [M, K] base type, rows ldx apart
  int64_t ldx;
  const void* lora_A_t;  // [r, K] adapter type, packed
  const void* lora_B_t;  // [N, r] adapter type, packed
  const void* bias;      // [N] compute type: bias + scaling * lora_bias, or null
  double scaling;
  DropoutArgs dropout;
  void* y;  // [M, N] base type, written
  void* h;  // [M, r] compute type, written, or null
};

struct BackwardArgs {
  int64_t M, K, N, r;  // as above
  const void* dy;      // [M, N] base type, rows lddy apart
  int64_t lddy;
  const void* x;  // [M, K] base type, rows ldx apart, or null
  int64_t ldx;
  const void* h;         // [M, r] compute type, or null: then recomputed from x
  const void* lora_A;    // [r, K] adapter type
  const void* lora_B;    // [N, r] adapter type
  const void* lora_A_t;  // lora_A packed; may be null if h is given or dB not wanted
  double scaling;
  DropoutArgs dropout;
  void* dx;  // [M, K] base type, written, or null
};

struct ColumnScaleArgs {
  int64_t N;
  const void* z;  // [M, N] base type, rows ldz apart
  int64_t ldz;
  const void* scale;  // [N] compute type
  const void* bias;   // [N] compute type, or null
  void* y;            // [M, N] base type, written
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

// W [N, K], base type, with steps between its rows and its columns; one of them is 1.
struct DroppedWeight {
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

struct DroppedForwardArgs {
  DroppedWeight weight;
  const void* scale_minus_1;  // [N] compute type
  double survivor;            // 1 / (1 - p)
  void* z;                    // [M, N] base type, x W^T; v is written in its place
  void* y;                    // [M, N] base type, added to
};

struct DroppedBackwardArgs {
  DroppedWeight weight;
  const void* u;   // [M, N] base type
  const void* dy;  // [M, N] base type, rows lddy apart
  int64_t lddy;
  void* dx;  // [M, K] base type, added to
};

struct LoraLinearKernels {
  // Bytes of scratch that one call of forward_rows or backward_rows needs.
  int64_t (*scratch_bytes)(int64_t K, int64_t r);
  // Rows [begin, end) of in [rows, columns] (adapter type), transposed to the order in which the
  // kernels read it; out is packed_bytes long.
  int64_t (*packed_bytes)(int64_t rows, int64_t columns);
  void (*pack)(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
               void* out);
  // Rows [begin, end) of y = scaling * dropout(x) A^T B^T + bias, and of h = dropout(x) A^T.
  void (*forward_rows)(const ForwardArgs&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of dx = dropout'(dh A) with dh = scaling * dy B; the sums over these rows
  // dh^T dropout(x) go to dA [r, K] and h^T dy (not scaled) to dB [r, N], in the compute type;
  // either may be null.
  void (*backward_rows)(const BackwardArgs&, int64_t begin, int64_t end, void* dA, void* dB,
                        void* scratch);
  // Rows [begin, end) of out [rows, columns] (adapter type) = scale * sum over p of
  // parts[p * stride ..] (compute type), in order; for the sums of dA and, transposed, of dB.
  void (*reduce_a)(const void* parts, int64_t count, int64_t stride, double scale, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, void* out);
  void (*reduce_b)(const void* parts, int64_t count, int64_t stride, double scale, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, void* out);
};

struct MergeKernels {
  // Bytes of scratch that one call of merge_rows needs.
  int64_t (*scratch_bytes)(int64_t K, int64_t r);
  // Rows [begin, end) of weight [N, K] = weight * scale + scaling * B A, scale in the compute type
  // being row_scale [N] or column_scale [K] or, both null, 1. Returns whether every result is
  // finite; `store` false only looks.
  bool (*merge_rows)(void* weight, int64_t ldw, const void* row_scale, const void* column_scale,
                     const void* lora_A, const void* lora_B, int64_t K, int64_t r, double scaling,
                     int64_t begin, int64_t end, bool store, void* scratch);
  // The same for norm_rows.
  int64_t (*norm_scratch_bytes)(int64_t r);
  // Adds the squares of rows [begin, end) of weight [N, K] + scaling * B A to sums [N], or
  // by_column to sums [K], in the compute type.
  void (*norm_rows)(const void* weight, int64_t ldw, const void* lora_A, const void* lora_B,
                    int64_t K, int64_t r, double scaling, int64_t begin, int64_t end,
                    bool by_column, void* sums, void* scratch);
};

// For the base's storage type; that of the adapter is of no account.
struct ElementwiseKernels {
  // Rows [begin, end) of y = z * scale + bias.
  void (*column_scale_rows)(const ColumnScaleArgs&, int64_t begin, int64_t end);
  // Rows [begin, end) of dz = dy * scale; the sums over these rows of dy * z and of dy are added to
  // dscale and dbias [N], in the compute type; either may be null. Scratch: 2 N compute elements.
  void (*column_scale_backward_rows)(const ColumnScaleBackwardArgs&, int64_t begin, int64_t end,
                                     void* dscale, void* dbias, void* scratch);
  // Rows [begin, end) of out [M, K] = dropout(x), rows of x ldx apart.
  void (*dropout_rows)(const void* x, int64_t ldx, int64_t K, const DropoutArgs& dropout,
                       int64_t begin, int64_t end, void* out);
};

// For the base's storage type, like ElementwiseKernels.
struct DroppedKernels {
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
  void (*forward)(const DroppedForwardArgs&, const DroppedLists&, int64_t panel, void* scratch);
  // dx -= (u - dy) W where x was dropped, for blocks [first, last) of columns of dx.
  void (*backward)(const DroppedBackwardArgs&, const DroppedLists&, int64_t first_block,
                   int64_t last_block, void* scratch);
};

struct EmbeddingForwardArgs {
  int64_t V, D, r;
  const int64_t* tokens;  // [M], each in [0, V)
  const void* weight;     // [V, D] base type, rows ldw apart
  int64_t ldw;
  const void* lora_A;    // [r, V] adapter type
  const void* lora_B_t;  // [D, r] adapter type, packed
  double scaling;
  void* y;  // [M, D] base type, written
};

struct EmbeddingBackwardArgs {
  int64_t V, D, r;
  const int64_t* tokens;  // [M], each in [0, V)
  const void* dy;         // [M, D] base type, rows lddy apart
  int64_t lddy;
  const void* lora_A;  // [r, V] adapter type
  const void* lora_B;  // [D, r] adapter type
  double scaling;
  void* dh;  // [M, r] compute type, written, or null
};

struct LoraEmbeddingKernels {
  // Bytes of scratch that one call of forward_rows or backward_rows needs.
  int64_t (*scratch_bytes)(int64_t r);
  // Rows [begin, end) of y = weight[tokens] + scaling * h B^T, with h = A^T[tokens].
  void (*forward_rows)(const EmbeddingForwardArgs&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of dh = scaling * dy B; the sum over these rows h^T dy (not scaled) to
  // dB [r, D], in the compute type, or null.
  void (*backward_rows)(const EmbeddingBackwardArgs&, int64_t begin, int64_t end, void* dB,
                        void* scratch);
};

struct CpuKernels {
  LoraLinearKernels lora_linear[kDtypePairs];
  MergeKernels merge[kDtypePairs];
  ElementwiseKernels elementwise[kDtypePairs];
  DroppedKernels dropped[kDtypePairs];
  LoraEmbeddingKernels lora_embedding[kDtypePairs];
  // keep[row][column] (one byte each) for rows [begin, end).
  // of the rows from `begin` to `end`, to `keep` [end - begin, columns]
  void (*dropout_mask_rows)(DropoutRng rng, uint32_t threshold, int64_t columns, int64_t begin,
                            int64_t end, uint8_t* keep);
};

namespace isa_default {
extern const CpuKernels kKernels;
}
namespace isa_avx2 {
extern const CpuKernels kKernels;
}
namespace isa_avx512 {
extern const CpuKernels kKernels;
}
namespace isa_avx512_bf16 {
extern const LoraLinearKernels kBf16Kernels;
}

// What the vector kernels may use on this CPU. The environment variable LORA_EXT_CPU_CAPABILITY
// (default, avx2, avx512, avx512_bf16) lowers it, once per process.
enum class CpuCapability { Default, Avx2, Avx512, Avx512Bf16 };
CpuCapability cpu_capability();
const char* cpu_capability_name(CpuCapability capability);

// The table for that capability.
const CpuKernels& cpu_kernels();

// Kernels for bf16 base and adapters on bf16 dot products; null without the capability.
const LoraLinearKernels* bf16_dot_kernels();

}  // namespace lora_ext
