// What the CUDA backend asks of the kernels for layers of one x: plain data, no CUDA headers.
#pragma once

#include <span>

#include "lora_linear.h"

namespace lora_ext {

constexpr int kMostTogether = 4;  // layers of one x

// As run_forward and run_backward of each layer, with shared passes over x and one product. All x
// are the same, all dx too, into which the layers' are summed; all weights are there and lie alike.
// A layer of rank 0 has no adapter. In backward there is no dropout, and h where dB is wanted.
template <class T, class TA>
void run_multi_forward(std::span<const ForwardCall<T, TA>> calls, const Allocator& scratch,
                       Stream stream, KernelFamily family);
template <class T, class TA>
void run_multi_backward(std::span<const BackwardCall<T, TA>> calls, const Allocator& scratch,
                        Stream stream, KernelFamily family);

}  // namespace lora_ext
