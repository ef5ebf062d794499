// What operators need that cut their rows into parts, one thread each: packed adapters, scratch,
// and sums over each part.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "cpu/kernels.h"

namespace lora_ext {

using at::Tensor;

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

// One block of scratch for each range of rows.
struct Scratch {
  int64_t bytes;
  Tensor blocks;

  Scratch(int64_t bytes_of_one, int64_t parts)
      : bytes(bytes_of_one), blocks(at::empty({parts, bytes}, at::kByte)) {}
  void* part(int64_t index) const { return blocks.data_ptr<uint8_t>() + index * bytes; }
};

// Sums over each range of rows of one adapter gradient, added up in a fixed order.
struct PartialSums {
  Tensor parts;   // [parts, rows, columns] compute type; undefined if there is nothing to sum
  Tensor result;  // [rows, columns] adapter type; undefined if not wanted or without elements

  PartialSums(const Tensor& gradient, int64_t count, at::ScalarType compute, bool transposed)
      : result(gradient.defined() && gradient.numel() > 0 ? gradient : Tensor()) {
    if (!result.defined()) return;
    const bool in_place = count == 1 && compute == result.scalar_type() && !transposed;
    parts = in_place ? result.unsqueeze(0)
                     : at::empty({count, result.size(0), result.size(1)},
                                 result.options().dtype(compute));
  }

  void* part(int64_t index) const {
    if (!parts.defined()) return nullptr;
    return static_cast<char*>(parts.data_ptr()) + index * parts.stride(0) * parts.element_size();
  }

  void reduce(decltype(LoraLinearKernels::reduce_a) kernel, double scale) const {
    if (!result.defined()) return;
    const int64_t rows = result.size(0), columns = result.size(1);
    const int64_t min_rows = at::divup(8192, std::max<int64_t>(columns, 1));
    at::parallel_for(0, rows, min_rows, [&](int64_t begin, int64_t end) {
      kernel(parts.const_data_ptr(), parts.size(0), parts.stride(0), scale, rows, columns, begin,
             end, result.data_ptr());
    });
  }
};

}  // namespace lora_ext
