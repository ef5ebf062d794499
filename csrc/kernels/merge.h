// merge_ of a weight, by a kernel for any GPU: plain data, no CUDA headers.
#pragma once

#include <cstdint>

#include "element.h"
#include "stream.h"

namespace lora_ext {

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
