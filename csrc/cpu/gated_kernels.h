// The vector kernels of f(e) * g, what stands between the projections of an MLP. f is SiLU, or
// tanh's form of GELU, which is e times the sigmoid of a polynomial. Of float, bf16 and fp16.
#pragma once

#include <cstdint>

namespace lora_ext {

struct GatedArgs {
  int64_t N;
  bool gelu_tanh;  // else SiLU
  const void *e, *g;
  int64_t lde, ldg;  // in elements, as all that follow
  void* out;         // [M, N]
  int64_t ldout;
};

struct GatedBackwardArgs {
  int64_t N;
  bool gelu_tanh;
  const void *da, *e, *g;
  int64_t ldda, lde, ldg;
  void *de, *dg;  // either may be da
  int64_t ldde, lddg;
};

// Rows [begin, end); null for double.
struct GatedKernels {
  void (*forward_rows)(const GatedArgs&, int64_t begin, int64_t end);
  void (*backward_rows)(const GatedBackwardArgs&, int64_t begin, int64_t end);
};

}  // namespace lora_ext
