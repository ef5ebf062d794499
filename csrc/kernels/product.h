// The product that ends forward and backward, y or dx: several segments into the same sums,
//
//   out [M, N] = round(sum over segments of A_i [M, K_i] B_i [K_i, N] + bias)
//
// Forward is (x, weight), (h, lora_B); backward's dx is (dh, lora_A), dropout's mask, (dy, weight).
// Each family has a kernel for it; the launches before it serve both.
#pragma once

#include "lora_linear.h"

namespace lora_ext {

constexpr int kMaxSegments = 3;

// B is read as it lies: kColumns rows are columns of B (a weight [N, K] in forward), kRows rows are
// rows of B (the same weight in backward).
enum class BLayout { kColumns, kRows };

template <class T>
struct Segment {
  Matrix<T> a;  // [M, K_i]
  Matrix<T> b;  // [N, K_i] or [K_i, N], by the layout
};

template <class T>
struct Product {
  Segment<T> segments[kMaxSegments];
  int count;
  bool aligned;  // every matrix is
  int masked;    // dropout is applied to the sums of the first `masked` segments
  uint32_t threshold;
  const int64_t* rng_state;  // [2]: seed and offset; on the device, for CUDA graphs
  const float* bias;         // [N] or null
  T* out;                    // [M, N], contiguous
  int64_t M, N;
};

template <class T>
using ProductLauncher = void (*)(const Product<T>&, BLayout, Stream);

namespace sm80 {

template <class T>
void product(const Product<T>& product, BLayout layout, Stream stream);

// forward and backward with the product given.
template <class T, class TA>
void forward_with(const ForwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                  ProductLauncher<T> launch_product);
template <class T, class TA>
void backward_with(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                   ProductLauncher<T> launch_product);

}  // namespace sm80

}  // namespace lora_ext
