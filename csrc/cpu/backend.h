// What the CPU operators share: the kernels of their dtypes, the state of dropout, threads; and,
// for those that cut their rows into parts, packed adapters, scratch, and sums over each part.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"
#include "ops/tensors.h"

namespace lora_ext {

// Adapters have the base's dtype, or are float beside 16 bits.
inline const CpuKernels& cpu_kernels(at::ScalarType base, at::ScalarType adapter) {
  return cpu_kernels([&] {
    if (base == at::kDouble) return DtypePair::F64;
    if (base == at::kFloat) return DtypePair::F32;
    if (base == at::kBFloat16) {
      return adapter == at::kFloat ? DtypePair::BF16_F32 : DtypePair::BF16;
    }
    return adapter == at::kFloat ? DtypePair::F16_F32 : DtypePair::F16;
  }());
}
inline const CpuKernels& cpu_kernels(at::ScalarType base) { return cpu_kernels(base, base); }

// Whether ATen's BLAS multiplies M rows of the dtype at full speed on this CPU: a single row of
// bf16 waits for the memory, in oneDNN's kernels for AVX-512, and not for instructions.
inline bool has_fast_blas(at::ScalarType dtype, int64_t M) {
  return cpu_multiplies(dtype) ||
         (M == 1 && dtype == at::kBFloat16 && cpu_capability() >= CpuCapability::Avx512);
}

inline DropoutArgs dropout_args(double dropout_p, const OptionalTensor& rng_state) {
  if (dropout_p == 0.0) return {false, dropout_threshold(0.0), 1.0, {}};
  const Tensor state = rng_state->contiguous();
  const int64_t* words = state.const_data_ptr<int64_t>();
  return {true,
          dropout_threshold(dropout_p),
          dropout_scale(dropout_p),
          {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])}};
}

// Cuts [0, items) into `parts` ranges, f(part, begin, end). The cut does not depend on which thread
// runs a part, so sums that are kept per part and added in order are reproducible.
template <class F>
void parallel_parts(int64_t items, int64_t parts, const F& f) {
  const int64_t size = parts > 0 ? at::divup(items, parts) : 0;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = std::min(items, part * size);
      f(part, begin, std::min(items, begin + size));
    }
  });
}

// The adapter in the order in which the kernels read its transpose.
inline Tensor packed(const LoraLinearKernels& kernels, const Tensor& adapter) {
  const int64_t rows = adapter.size(0), columns = adapter.size(1);
  Tensor result = at::empty({kernels.packed_bytes(rows, columns)}, at::kByte);
  constexpr int64_t kMinElements = 32768;  // fewer do not pay for waking a thread
  at::parallel_for(0, rows, at::divup(kMinElements, std::max<int64_t>(columns, 1)),
                   [&](int64_t begin, int64_t end) {
                     kernels.pack(adapter.const_data_ptr(), rows, columns, begin, end,
                                  result.data_ptr());
                   });
  return result;
}

// One block of scratch for each part.
struct Scratch {
  int64_t bytes;
  Tensor blocks;

  Scratch(int64_t bytes_of_one, int64_t parts)
      : bytes(bytes_of_one), blocks(at::empty({parts, bytes}, at::kByte)) {}
  void* part(int64_t index) const { return blocks.data_ptr<uint8_t>() + index * bytes; }
};

// Sums over each range of rows of one adapter gradient, added up in a fixed order.
struct PartialSums {
  Tensor sums;    // [parts, rows, columns] compute type; undefined if there is nothing to sum
  Tensor result;  // [rows, columns] adapter type; undefined if not wanted or without elements

  PartialSums(const Tensor& gradient, int64_t count, at::ScalarType compute, bool transposed)
      : result(gradient.defined() && gradient.numel() > 0 ? gradient : Tensor()) {
    if (!result.defined()) return;
    const bool in_place = count == 1 && compute == result.scalar_type() && !transposed;
    sums = in_place ? result.unsqueeze(0)
                    : at::empty({count, result.size(0), result.size(1)},
                                result.options().dtype(compute));
  }

  void* part(int64_t index) const {
    if (!sums.defined()) return nullptr;
    return static_cast<char*>(sums.data_ptr()) + index * sums.stride(0) * sums.element_size();
  }

  void reduce(decltype(LoraLinearKernels::reduce_a) kernel, double factor) const {
    if (!result.defined()) return;
    if (sums.const_data_ptr() == result.const_data_ptr() && factor == 1.0) return;  // one part
    const int64_t rows = result.size(0), columns = result.size(1);
    const int64_t min_rows = at::divup(8192, std::max<int64_t>(columns, 1));
    at::parallel_for(0, rows, min_rows, [&](int64_t begin, int64_t end) {
      kernel(sums.const_data_ptr(), sums.size(0), sums.stride(0), factor, rows, columns, begin, end,
             result.data_ptr());
    });
  }
};

}  // namespace lora_ext
