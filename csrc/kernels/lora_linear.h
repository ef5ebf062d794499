// What the CUDA backend asks of the kernels of lora_linear: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "element.h"
#include "family.h"
#include "stream.h"

namespace lora_ext {

// A matrix in global memory, rows of `columns` elements `stride` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  // Whether 16-byte copies may begin at every eighth column.
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride % 8 == 0);
  }
};

// A weight [N, K] as it lies in memory: its rows, or its columns, as GPT-2's Conv1D keeps it.
template <class T>
struct Weight {
  Matrix<T> stored;  // [N, K] or, transposed, [K, N]; data null: without the base product
  bool transposed = false;

  int64_t N() const { return transposed ? stored.columns : stored.rows; }
  int64_t K() const { return transposed ? stored.rows : stored.columns; }
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

template <class T, class TA>
struct ForwardCall {
  Matrix<T> x;        // [M, K]
  Weight<T> weight;   // [N, K]
  const float* bias;  // [N], 8-byte aligned, or null; added before y is rounded
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
  Weight<T> weight;  // [N, K]
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

// What an embedding's backward takes of that of lora_linear: the pass over dy alone.
template <class T, class TA>
struct UpGradCall {
  Matrix<T> dy;      // [M, N]
  const float* h;    // [M, r] or null if dB is not wanted
  const TA* lora_B;  // [N, r]
  int r;
  float scaling;
  float* dh;  // [M, r] or null: scaling * dy B
  TA* dB;     // [N, r] or null: scaling * dy^T h
};

// By the kernels of this family. They throw std::runtime_error if one cannot be launched.
template <class T, class TA>
void run_forward(const ForwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                 KernelFamily family);
template <class T, class TA>
void run_backward(const BackwardCall<T, TA>& call, const Allocator& scratch, Stream stream,
                  KernelFamily family);
template <class T, class TA>
void run_up_grad(const UpGradCall<T, TA>& call, const Allocator& scratch, Stream stream,
                 KernelFamily family);

}  // namespace lora_ext
