// What the emulator computes for tensor cores, of operands that were read and checked. Optimised
// and without the sanitizers in every build: most of the time of large products is spent here.
#pragma once

#define SIMT_ARITHMETIC __attribute__((optimize("O3"), no_sanitize("address", "undefined")))

namespace simt {

// product = a b, each sum in the order of k.
template <int kRows, int kColumns>
SIMT_ARITHMETIC void multiply_matrices(const float (&a)[kRows][16], const float (&b)[16][kColumns],
                                       float (&product)[kRows][kColumns]) {
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) product[row][column] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < kColumns; ++column) {
        product[row][column] += a[row][k] * b[k][column];
      }
    }
  }
}

}  // namespace simt
