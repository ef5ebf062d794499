// The small kernels between the passes of lora_linear: sums of parts, and adapters prepared for
// tensor cores.
#pragma once

#include "elementwise.h"
#include "fp16_range.h"
#include "lora_linear_passes.h"

namespace lora_ext {

// Several jobs of a launch, each of whole blocks; run(i) of a job makes one of its elements.
template <class Job>
struct Jobs {
  static constexpr int kMost = 3 * kMostTogether;  // lora_A, lora_B and h of each layer
  Job job[kMost];
  int64_t elements[kMost];
  unsigned first_block[kMost];
  int count;

  // This thread's element of its block's job.
  LORA_EXT_DEVICE void run() const {
    int64_t element = element_index();
    int at = 0;
    while (at + 1 < count && blockIdx.x >= first_block[at + 1]) ++at;
    element -= int64_t{first_block[at]} * kElementThreads;
    if (element < elements[at]) job[at].run(element);
  }
};

template <class Job>
class JobList {
 public:
  void add(const Job& job, int64_t elements) {
    jobs_.job[jobs_.count] = job;
    jobs_.elements[jobs_.count] = elements;
    jobs_.first_block[jobs_.count++] = static_cast<unsigned>(blocks_);
    blocks_ += ceil_div(elements, kElementThreads);
  }
  // All that were added since the last time; one by one where they are more than a grid holds.
  void launch(void (*kernel)(Jobs<Job>), Stream stream, int shared_bytes = 0) {
    if (blocks_ > kMostBlocks && jobs_.count > 1) {
      for (int i = 0; i < jobs_.count; ++i) {
        JobList one;
        one.add(jobs_.job[i], jobs_.elements[i]);
        one.launch(kernel, stream, shared_bytes);
      }
    } else if (blocks_ > 0) {
      launch_elements(kernel, blocks_ * kElementThreads, stream, jobs_, shared_bytes);
    }
    *this = {};
  }

 private:
  static constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

  Jobs<Job> jobs_{};
  int64_t blocks_ = 0;
};

// ---- h and dh from their parts -----------------------------------------------------------------

template <class T>
struct FinishJob {
  const float* parts;  // [count, M, r], rows `stride` apart
  int count;
  int64_t stride;
  Hidden<T> out;

  LORA_EXT_DEVICE void run(int64_t i) const {
    const int64_t row = i / out.padded;
    const int column = static_cast<int>(i % out.padded);
    float sum = 0.0f;
    if (column < out.r) {
      for (int p = 0; p < count; ++p) sum += parts[(p * out.M + row) * stride + column];
    }
    out.store(sum, out.scaling.get(), row, column);
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_finish_kernel(const __grid_constant__ Jobs<FinishJob<T>> jobs) {
  jobs.run();
}

template <class T>
void finish(const Parts& parts, const Hidden<T>& out, Stream stream) {
  JobList<FinishJob<T>> jobs;
  jobs.add({parts.data, parts.count, out.r, out}, out.M * out.padded);
  jobs.launch(lora_linear_finish_kernel<T>, stream);
}

// ---- dB and dA from their parts ----------------------------------------------------------------

template <class T>
struct ReduceJob {
  const float* parts;  // [count, size]
  int64_t count, size;
  Gradient<T> out;

  LORA_EXT_DEVICE void run(int64_t i) const {
    float sum = 0.0f;
    for (int64_t p = 0; p < count; ++p) sum += parts[p * size + i];
    out.store(sum, out.factor(), i);
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_reduce_kernel(const __grid_constant__ Jobs<ReduceJob<T>> jobs) {
  jobs.run();
}

// What the passes leave to be added, all by one kernel.
template <class T>
class Gradients {
 public:
  void add(const Parts& parts, int64_t size, const Gradient<T>& out) {
    jobs_.add({parts.data, parts.count, size, out}, size);
  }
  void launch(Stream stream) { jobs_.launch(lora_linear_reduce_kernel<T>, stream); }

 private:
  JobList<ReduceJob<T>> jobs_;
};

// ---- Adapters ----------------------------------------------------------------------------------

// A matrix as a Split, filled up with zeros: columns, so that 16-byte copies may read it, and rows.
template <class T>
struct PackJob {
  const void* in;  // [rows, columns], their elements `row_step` and `column_step` apart
  bool in_float;   // or T
  int64_t rows, columns, row_step, column_step;
  int64_t padded_rows, padded_columns, stride;  // of the result
  T* value;
  T* remainder;      // laid out like value; or null
  Range range = {};  // of fp16: of a float matrix, whose values this multiplies, too
  HiddenFactor factor = {1.0f, nullptr};

  LORA_EXT_DEVICE void run(int64_t i) const {
    const int64_t row = i / padded_columns, column = i % padded_columns;
    float full = 0.0f, power = 1.0f;
    if constexpr (kScaled<T>) {
      if (range.largest) {
        const PowerOfTwo both = range.power();
        power = both.to;
        if (i == 0) *range.back = both.back;
        if (row >= padded_rows) return;
      }
    }
    if (row < rows && column < columns) {
      const int64_t at = row * row_step + column * column_step;
      full = in_float ? static_cast<const float*>(in)[at] : to_float(static_cast<const T*>(in)[at]);
    }
    if constexpr (kScaled<T>) {
      if (range.largest) full = rounded_product(rounded_product(factor.get(), full), power);
    }
    const T near = rounded<T>(full);
    const int64_t to = row * stride + column;
    value[to] = near;
    if (remainder) remainder[to] = rounded<T>(left_of(full, near));
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_measure_kernel(const __grid_constant__ Jobs<MeasureJob> jobs) {
  jobs.run();
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    lora_linear_pack_kernel(const __grid_constant__ Jobs<PackJob<T>> jobs) {
  jobs.run();
}

}  // namespace lora_ext
