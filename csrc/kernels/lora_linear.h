// What the CUDA backend asks of the kernels: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "element.h"

struct CUstream_st;

namespace lora_ext {

using Stream = CUstream_st*;  // cudaStream_t

// A matrix in global memory, rows of `columns` elements `stride` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  // Whether 16-byte copies may begin at every eighth column.
  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0; }
};

// Scratch that lives until the kernels launched so far have run.
struct Allocator {
  void* (*allocate)(void* context, int64_t bytes);
  void* context;

  template <class E>
  E* get(int64_t count) const {
    return static_cast<E*>(allocate(context, count * static_cast<int64_t>(sizeof(E))));
  }
};

struct Dropout {
  bool enabled;
  uint32_t threshold;
  float scale;
  const int64_t* rng_state;  // [2] on the device
};

template <class T, class TA>
struct ForwardCall {
  Matrix<T> x;        // [M, K]
  Matrix<T> weight;   // [N, K]; data null: y is without the base product
  const float* bias;  // [N] or null; added before y is rounded
  const TA* lora_A;   // [r, K]
  const TA* lora_B;   // [N, r]
  int r;
  float scaling;
  const float* scaling_factor;  // on the device: multiplies scaling; or null
  Dropout dropout;
  T* y;      // [M, N]
  float* h;  // [M, r] or null
};

template <class T, class TA>
struct BackwardCall {
  Matrix<T> dy;      // [M, N]
  Matrix<T> x;       // [M, K]; data null if neither dA is wanted nor h missing
  Matrix<T> weight;  // [N, K]; data null: dx is without the base product
  const float* h;    // [M, r] or null: then made from x
  const TA* lora_A;  // [r, K]
  const TA* lora_B;  // [N, r]
  int r;
  float scaling;
  const float* scaling_factor;  // on the device: multiplies scaling; or null
  Dropout dropout;
  T* dx;   // [M, K] or null
  TA* dA;  // [r, K] or null
  TA* dB;  // [N, r] or null
};

// By the kernels for a GPU of this compute capability, 90 for sm_90. They throw std::runtime_error
// if a kernel cannot be launched.
template <class T, class TA>
void run_forward(const ForwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                 int compute_capability);
template <class T, class TA>
void run_backward(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                  int compute_capability);

// state[0], state[1] = seed, offset, as torch's Philox generator holds them: on the device while a
// CUDA graph is captured (then seed and offset are added up there), else as numbers.
struct PhiloxState {
  bool captured;
  uint64_t seed, offset;
  const int64_t *seed_pointer, *offset_pointer;
  uint32_t offset_in_graph;
};
void fill_rng_state(const PhiloxState& philox, int64_t* state, Stream stream);

void dropout_mask(const int64_t* rng_state, uint32_t threshold, int64_t first_row, int64_t rows,
                  int64_t columns, bool* keep, Stream stream);

// weight += scaling * B A; false `write` only looks. *finite, on the device, becomes 0 where a
// result is not finite.
template <class T, class TA>
struct MergeCall {
  T* weight;  // [N, K], rows `stride` apart
  int64_t N, K, stride;
  const TA* lora_A;  // [rank, K]
  const TA* lora_B;  // [N, rank]
  int rank;
  float scaling;
  bool write;
  int* finite;
};
template <class T, class TA>
void merge(const MergeCall<T, TA>& call, Stream stream);

}  // namespace lora_ext
