// merge_ of a weight, one thread an element.
#include "elementwise.h"
#include "merge.h"

namespace lora_ext {
namespace {

// Summed in float and rounded once.
template <class T, class TA>
__global__ void __launch_bounds__(kElementThreads)
    merge_kernel(const __grid_constant__ MergeCall<T, TA> params) {
  const int64_t i = element_index();
  if (i >= params.N * params.K) return;
  const int64_t n = i / params.K, k = i % params.K;
  float sum = 0.0f;
  for (int j = 0; j < params.rank; ++j) {
    sum += params.scaling * to_float(params.lora_B[n * params.rank + j]) *
           to_float(params.lora_A[j * params.K + k]);
  }
  T* weight = params.weight + n * params.stride + k;
  const T result = rounded<T>(to_float(*weight) + sum);
  const float back = to_float(result);
  if (back - back != 0.0f) *params.finite = 0;  // every thread that gets here writes the same
  if (params.write) *weight = result;
}

}  // namespace

template <class T, class TA>
void merge(const MergeCall<T, TA>& call, Stream stream) {
  launch_elements(merge_kernel<T, TA>, call.N * call.K, stream, call);
}

template void merge(const MergeCall<Bf16, Bf16>&, Stream);
template void merge(const MergeCall<Bf16, float>&, Stream);
template void merge(const MergeCall<Fp16, Fp16>&, Stream);
template void merge(const MergeCall<Fp16, float>&, Stream);
template void merge(const MergeCall<float, float>&, Stream);

}  // namespace lora_ext
