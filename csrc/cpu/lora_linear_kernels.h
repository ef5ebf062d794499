// The vector kernels of lora_linear, and of packing adapters and adding up sums of their gradients.
// Leading dimensions are in elements.
#pragma once

#include <cstdint>

#include "dropout_kernels.h"

namespace lora_ext {

struct LoraLinearForwardArgs {
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
  // Of rows that have adapters of their own
  const double* row_factors = nullptr;  // [M]: multiply scaling for each row; or null
  bool add_y = false;                   // to what y holds
  const void* lora_A = nullptr;         // as they lie, for single_rows
  const void* lora_B = nullptr;
};

struct LoraLinearBackwardArgs {
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
  void* dx;          // [M, K] base type, written, or null
  bool add = false;  // to what dA and dB hold, of rows before these
  // Of rows that have adapters of their own
  const double* row_factors = nullptr;  // [M]: multiply scaling for each row; or null
  double* drow_factors = nullptr;       // [M], written: their gradients; needs h; or null
  bool add_dx = false;                  // to what dx holds
};

// Several low-rank parts of one x.
struct LoraLinearMultiForwardArgs {
  const LoraLinearForwardArgs* layers;  // of the same M, K, x and ldx
  int64_t count;
  int64_t R;             // the sum of their ranks
  const void* lora_A_t;  // [R, K] adapter type, packed: all lora_A as one, in their place; or null
};

struct LoraLinearMultiBackwardArgs {
  // Likewise; without dx, and with lora_A, where dx is wanted, in the compute type (for kernels on
  // bf16 dot products as it is).
  const LoraLinearBackwardArgs* layers;
  int64_t count;
  int64_t R;
  void* dx;  // [M, K] base type, added to; or null
};

struct LoraLinearKernels {
  // Bytes of scratch that one call of forward_rows or backward_rows needs.
  int64_t (*scratch_bytes)(int64_t K, int64_t r);
  // Rows [begin, end) of in [rows, columns] (adapter type), transposed to the order in which the
  // kernels read it; out is packed_bytes long.
  int64_t (*packed_bytes)(int64_t rows, int64_t columns);
  void (*pack)(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
               void* out);
  // Rows [begin, end) of y = scaling * dropout(x) A^T B^T + bias, and of h = dropout(x) A^T, which
  // has no factor of rows.
  void (*forward_rows)(const LoraLinearForwardArgs&, int64_t begin, int64_t end, void* scratch);
  // The same, reading lora_A and lora_B as they lie: for very few rows. Bytes of scratch for it.
  int64_t (*single_rows_bytes)(int64_t K, int64_t r);
  void (*single_rows)(const LoraLinearForwardArgs&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end) of dx = dropout'(dh A) with dh = scaling * dy B; the sums over these rows
  // dh^T dropout(x) go to dA [r, K] and h^T dy (not scaled, but with the factors of rows) to dB
  // [r, N], in the compute type; either may be null.
  void (*backward_rows)(const LoraLinearBackwardArgs&, int64_t begin, int64_t end, void* dA,
                        void* dB, void* scratch);
  // The same for several low-rank parts of one x. Bytes of scratch for so many masks, one for each
  // layer or, without dropout, none; y and h of each; dA and dB of each, and dx += their sum.
  int64_t (*multi_scratch_bytes)(int64_t K, int64_t R, int64_t masks);
  void (*multi_forward_rows)(const LoraLinearMultiForwardArgs&, int64_t begin, int64_t end,
                             void* scratch);
  void (*multi_backward_rows)(const LoraLinearMultiBackwardArgs&, int64_t begin, int64_t end,
                              void* const* dA, void* const* dB, void* scratch);
  // Rows [begin, end) of out [rows, columns] (adapter type) = factor * the sum over p < count of
  // sums[p * stride ..] (compute type), in order; for the sums of dA and, transposed, of dB.
  void (*reduce_a)(const void* sums, int64_t count, int64_t stride, double factor, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, void* out);
  void (*reduce_b)(const void* sums, int64_t count, int64_t stride, double factor, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, void* out);
};

}  // namespace lora_ext
