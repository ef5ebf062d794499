// Storage types of the CPU kernels. These files are compiled once per instruction set, so nothing
// here may come from torch or the C++ standard library: an inline function compiled for AVX-512
// could otherwise be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

namespace lora_ext {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Type in which a storage type is computed.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

}  // namespace lora_ext
