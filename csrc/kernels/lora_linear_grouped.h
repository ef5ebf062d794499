// What the CUDA backend asks of the kernels where rows have adapters of their own: plain data, no
// CUDA headers. The base product is there before: the kernels add each row's update to it.
#pragma once

#include <span>

#include "lora_linear.h"

namespace lora_ext {

// An adapter of the call, which `rows` places of `order` have; it may have none, or rank 0.
struct GroupedAdapter {
  const void* lora_A;     // [r, K], contiguous
  const void* lora_B;     // [N, r], contiguous
  const void* lora_bias;  // [N], or null
  bool in_float;          // they and their gradients; or of the base's type
  int r;
  int64_t rows;
  float scaling;
  Dropout dropout;
  // Of backward, what is wanted
  void* dA = nullptr;
  void* dB = nullptr;
  void* dlora_bias = nullptr;
};

// So many rows of an adapter are in a round, in which no row is twice.
struct GroupedRound {
  int adapter;
  int64_t round, rows;
};

// The rows of the first adapter, of the second, ..., in each at most once.
struct GroupedRows {
  std::span<const GroupedAdapter> adapters;
  const int* order;     // [R], on the device
  const float* factor;  // [R], on the device: multiplies the update of each of these rows; or null
  // Where a row may have several adapters: how `order` is divided, in its order. What rounds make
  // of a row is added round after round. Empty: each row has one.
  std::span<const GroupedRound> rounds = {};
};

// All rows begin at multiples of 16 bytes; h is [rows, r] of each adapter, one after another.
template <class T>
struct GroupedForwardCall {
  GroupedRows rows;
  Matrix<T> x;  // [M, K]
  T* y;         // [M, N], contiguous
  int64_t N;
  float* h;  // or null
};

template <class T>
struct GroupedBackwardCall {
  GroupedRows rows;
  Matrix<T> dy;    // [M, N]
  Matrix<T> x;     // [M, K]; data null if neither dA is wanted nor h missing
  const float* h;  // or null: then made from x, where a dB is wanted
  int64_t K;
  T* dx;           // [M, K], contiguous; or null
  float* dfactor;  // [R], or null
};

// By the kernels for sm_80 and later. What they are told of adapters and rows goes to the device in
// arguments of a kernel (write_table.h): nothing is copied, and nobody waits. They throw
// std::runtime_error if one cannot be launched.
template <class T>
void run_grouped_forward(const GroupedForwardCall<T>& call, const Allocator& scratch,
                         Stream stream);
template <class T>
void run_grouped_backward(const GroupedBackwardCall<T>& call, const Allocator& scratch,
                          Stream stream);

}  // namespace lora_ext
