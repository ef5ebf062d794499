// The small kernels between the passes of lora_linear: sums of parts, and adapters prepared for
// tensor cores.
#pragma once

#include "elementwise.h"
#include "lora_linear_passes.h"

namespace lora_ext {

// Several jobs of a launch, each of whole blocks.
template <class Job, int kMost>
struct Jobs {
  Job job[kMost];
  unsigned first_block[kMost];
  int count;

  // Which of them a block has; the element of its thread there.
  LORA_EXT_DEVICE const Job& of(int64_t& element) const {
    int at = 0;
    while (at + 1 < count && blockIdx.x >= first_block[at + 1]) ++at;
    element -= int64_t{first_block[at]} * kElementThreads;
    return job[at];
  }
};

template <class Job, int kMost>
class JobList {
 public:
  void add(const Job& job, int64_t elements) {
    jobs_.job[jobs_.count] = job;
    jobs_.first_block[jobs_.count++] = blocks_;
    blocks_ += static_cast<unsigned>(ceil_div(elements, kElementThreads));
  }
  void launch(void (*kernel)(Jobs<Job, kMost>), Stream stream) {
    if (blocks_ > 0) launch_elements(kernel, int64_t{blocks_} * kElementThreads, stream, jobs_);
    *this = {};
  }

 private:
  Jobs<Job, kMost> jobs_{};
  unsigned blocks_ = 0;
};

template <class T>
struct FinishParams {
  const float* parts;  // [count, M, r]
  int count;
  Hidden<T> out;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_finish_kernel(const __grid_constant__ FinishParams<T> params) {
  const Hidden<T>& out = params.out;
  const int64_t i = element_index();
  const int64_t row = i / out.padded;
  const int column = static_cast<int>(i % out.padded);
  if (row >= out.M) return;
  float sum = 0.0f;
  if (column < out.r) {
    for (int p = 0; p < params.count; ++p) {
      sum += params.parts[(p * out.M + row) * out.r + column];
    }
  }
  out.store(sum, out.scaling.get(), row, column);
}

template <class T>
void finish(const Parts& parts, const Hidden<T>& out, Stream stream) {
  launch_elements(lora_linear_finish_kernel<T>, out.M * out.padded, stream,
                  FinishParams<T>{parts.data, parts.count, out});
}
// dB and dA from their parts.
template <class T>
struct ReduceJob {
  const float* parts;  // [count, elements]
  int64_t count, elements;
  Gradient<T> out;
};
constexpr int kGradients = 2;

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_reduce_kernel(const __grid_constant__ Jobs<ReduceJob<T>, kGradients> jobs) {
  int64_t i = element_index();
  const ReduceJob<T>& job = jobs.of(i);
  if (i >= job.elements) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < job.count; ++p) sum += job.parts[p * job.elements + i];
  job.out.store(sum, job.out.scale.get(), i);
}

// What the passes leave to be added, all by one kernel.
template <class T>
class Gradients {
 public:
  void add(const Parts& parts, int64_t elements, const Gradient<T>& out) {
    jobs_.add({parts.data, parts.count, elements, out}, elements);
  }
  void launch(Stream stream) { jobs_.launch(lora_linear_reduce_kernel<T>, stream); }

 private:
  JobList<ReduceJob<T>, kGradients> jobs_;
};

// A matrix as a Split, filled up with zeros: columns, so that 16-byte copies may read it, and rows.
template <class T>
struct PackJob {
  const void* in;  // [rows, columns], their elements `row_step` and `column_step` apart
  bool in_float;   // or T
  int64_t rows, columns, row_step, column_step;
  int64_t padded_rows, padded_columns, stride;  // of the result
  T* value;
  T* remainder;  // laid out like value; or null
};
constexpr int kPacked = 3;  // lora_A, lora_B and h, or lora_A in two ways

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_pack_kernel(const __grid_constant__ Jobs<PackJob<T>, kPacked> jobs) {
  int64_t i = element_index();
  const PackJob<T>& job = jobs.of(i);
  const int64_t row = i / job.padded_columns, column = i % job.padded_columns;
  if (row >= job.padded_rows) return;
  float full = 0.0f;
  if (row < job.rows && column < job.columns) {
    const int64_t at = row * job.row_step + column * job.column_step;
    full = job.in_float ? static_cast<const float*>(job.in)[at]
                        : to_float(static_cast<const T*>(job.in)[at]);
  }
  const T near = rounded<T>(full);
  const int64_t to = row * job.stride + column;
  job.value[to] = near;
  if (job.remainder) job.remainder[to] = rounded<T>(left_of(full, near));
}

}  // namespace lora_ext
