// Dropout's state and mask by themselves, for any GPU.
#include "dropout.h"
#include "elementwise.h"

namespace lora_ext {
namespace {

struct FillRngParams {
  PhiloxState philox;
  int64_t* state;  // [2]
};

__global__ void fill_rng_state_kernel(const __grid_constant__ FillRngParams params) {
  if (threadIdx.x > 0) return;
  const PhiloxState& philox = params.philox;
  params.state[0] = philox.captured ? *philox.seed_pointer : static_cast<int64_t>(philox.seed);
  params.state[1] = philox.captured ? *philox.offset_pointer + philox.offset_in_graph
                                    : static_cast<int64_t>(philox.offset);
}

struct DropoutMaskParams {
  const int64_t* rng_state;  // [2] on the device
  uint32_t threshold;
  int64_t first_row, rows, columns;
  bool* keep;  // [rows, columns]
};

// One thread an element: for tests, second derivatives and what is composed of ATen's products.
__global__ void __launch_bounds__(kElementThreads)
    dropout_mask_kernel(const __grid_constant__ DropoutMaskParams params) {
  const int64_t i = element_index();
  if (i >= params.rows * params.columns) return;
  params.keep[i] =
      dropout_keep(dropout_rng(params.rng_state), params.first_row + i / params.columns,
                   i % params.columns, params.threshold);
}

}  // namespace

void fill_rng_state(const PhiloxState& philox, int64_t* state, Stream stream) {
  arch::launch(fill_rng_state_kernel, dim3(1), 32, 0, stream, FillRngParams{philox, state});
}

void dropout_mask(const int64_t* rng_state, uint32_t threshold, int64_t first_row, int64_t rows,
                  int64_t columns, bool* keep, Stream stream) {
  launch_elements(dropout_mask_kernel, rows * columns, stream,
                  DropoutMaskParams{rng_state, threshold, first_row, rows, columns, keep});
}

}  // namespace lora_ext
