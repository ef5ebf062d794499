// The small kernels between the passes of lora_linear_grouped, each once for all slots: h and dh
// from their parts, gradients from theirs, and adapters packed for tensor cores.
#pragma once

#include "grouped_slots.h"
#include "lora_linear_elementwise.h"

namespace lora_ext {

// ---- h and dh as operands ----------------------------------------------------------------------

template <class T>
struct GroupedFinish {
  const GroupedSlot<T>* slots;
  const GroupedWork* work;  // of each blockIdx.x; of all ranks of its slot
  const float* factor;      // or null
  const float* parts;       // of h or of dh, laid out like the operand; or null:
  const float* given;       // h as it was kept; or null: 0
  int64_t part;
  int count;
  bool dropped;  // the sums are without dropout's factor, which applies to them
  bool scaled;   // the operand is times the slot's scaling; else it is of dB, and 1 for lora_bias
  float* sums;   // h to be kept; or null
  T* value;
  T* remainder;    // or null
  const float* h;  // of dfactor
  float* dfactor;  // or null
};

constexpr int kFinishLanes = 16;  // of a row

// A block has up to 64 rows, a warp two of them at once.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    grouped_finish_kernel(const __grid_constant__ GroupedFinish<T> params) {
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kFinishLanes;
  const int warp = thread / 32, half = thread % 32 / kFinishLanes;
  const GroupedWork work = params.work[blockIdx.x];
  const GroupedSlot<T>& slot = params.slots[work.slot];
  const float survivor = params.dropped ? slot.survivor : 1.0f;
  for (int pair = warp * 2; pair < work.rows; pair += kElementThreads / kFinishLanes) {
    const int row = pair + half, place = work.begin + row;
    const bool inside = row < work.rows;
    float of_factor = 0.0f;
    if (inside) {
      const int64_t hidden = slot.hidden + int64_t{place - slot.begin} * slot.r;
      const int64_t operand = slot.operand_at(place, 0);
      const float factor = params.factor ? params.factor[place] : 1.0f;
      const float strength = params.scaled ? slot.strength(params.factor, place) : factor;
      for (int column = lane; column < slot.padded; column += kFinishLanes) {
        float sum = 0.0f;
        if (params.given) {
          if (column < slot.r) sum = params.given[hidden + column];
        } else if (column < slot.width) {
          for (int p = 0; p < params.count; ++p)
            sum += params.parts[p * params.part + operand + column];
        }
        const bool is_bias = column == slot.r;  // in what is wider than r
        if (params.dfactor && column < slot.width) {
          of_factor += is_bias ? sum : sum * params.h[hidden + column];
        }
        float own = column < slot.r ? rounded_product(survivor, sum) : 0.0f;
        if (params.sums && column < slot.r) params.sums[hidden + column] = own;
        if (!params.scaled && is_bias && column < slot.width) own = 1.0f;
        const float full = rounded_product(strength, own);
        const T near = rounded<T>(full);
        params.value[operand + column] = near;
        if (params.remainder) {
          params.remainder[operand + column] = rounded<T>(left_of(full, near));
        }
      }
    }
    if (!params.dfactor) continue;
#pragma unroll
    for (int flipped = kFinishLanes / 2; flipped > 0; flipped /= 2) {
      of_factor += __shfl_xor_sync(0xFFFFFFFFu, of_factor, flipped);
    }
    if (inside && lane == 0) params.dfactor[place] = slot.scaling * of_factor;
  }
}

// ---- Many jobs of a launch ---------------------------------------------------------------------

// As Jobs, in global memory: there may be thousands.
template <class Job>
struct TableJob {
  Job job;
  int64_t elements;
  unsigned first_block;
};

template <class Job>
struct TableJobs {
  const TableJob<Job>* jobs;
  int count;

  // This thread's element of the last job that begins at its block or before.
  LORA_EXT_DEVICE void run() const {
    const int64_t element = element_index();
    int at = 0, end = count;
    while (end - at > 1) {
      const int middle = (at + end) / 2;
      (blockIdx.x >= jobs[middle].first_block ? at : end) = middle;
    }
    const TableJob<Job>& found = jobs[at];
    const int64_t own = element - int64_t{found.first_block} * kElementThreads;
    if (own < found.elements) found.job.run(own);
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    grouped_pack_kernel(const __grid_constant__ TableJobs<PackJob<T>> jobs) {
  jobs.run();
}

// A slot's gradient of its parts, in their order; of none it is 0.
template <class T>
struct GroupedReduceJob {
  const float* parts;  // [count, size / width, width]
  int64_t count, size;
  int width, r;  // a column r is dlora_bias
  Gradient<T> out, dlora_bias;

  LORA_EXT_DEVICE void run(int64_t i) const {
    float sum = 0.0f;
    for (int64_t p = 0; p < count; ++p) sum += parts[p * size + i];
    const int64_t row = i / width, column = i % width;
    if (column < r) {
      if (is_wanted(out)) out.store(sum, out.scale.value, row * r + column);
    } else if (is_wanted(dlora_bias)) {
      dlora_bias.store(sum, dlora_bias.scale.value, row);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    grouped_reduce_kernel(const __grid_constant__ TableJobs<GroupedReduceJob<T>> jobs) {
  jobs.run();
}

}  // namespace lora_ext
