// Dropout of a call on CUDA, and its state and mask by themselves: no CUDA headers.
#pragma once

#include "../common/dropout.h"
#include "element.h"
#include "stream.h"

namespace lora_ext {

// Dropout of x: what the kernels of a call are told of it.
struct Dropout {
  bool enabled;
  uint32_t threshold;
  float scale;               // of what is kept
  const int64_t* rng_state;  // [2]: seed and offset; on the device, for CUDA graphs

  // Whether anything is dropped, on the host: below p = 2^-17 nothing is. Where it is so, the
  // threshold has 16 bits.
  bool drops() const { return enabled && threshold < 65536; }

  // Where `enabled`.
  LORA_EXT_DEVICE DropoutRng rng() const { return dropout_rng(rng_state); }
};

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

}  // namespace lora_ext
