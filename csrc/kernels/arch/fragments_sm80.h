// What the lanes of a warp hold of the operands of mma_m16n8k16: 16-bit elements two to a register,
// the first in the low half, and sums in float. In lane l
//
//   FragmentA  of A [16, 16]: a[i] is row l / 4 + 8 * (i % 2), columns 2 * (l % 4) + 8 * (i / 2)
//              and the next
//   FragmentB  of B [16, 8]: b[i] is column l / 4, rows 2 * (l % 4) + 8 * i and the next
//   FragmentC  of the sums [16, 8]: c[i] is row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
//
// as the PTX manual has it under "Matrix Fragments for mma.m16n8k16 with floating point type".
// wgmma gives each warp of a warpgroup 16 rows of its sums in the same way, for every 8 columns.
#pragma once

#include <cstdint>

namespace lora_ext::arch {

using FragmentA = uint32_t[4];
using FragmentB = uint32_t[2];
using FragmentC = float[4];

}  // namespace lora_ext::arch
