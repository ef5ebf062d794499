// Bytes as arguments of kernels: as many launches as it takes.
#include "elementwise.h"
#include "write_table.h"

namespace lora_ext {
namespace {

// With what else they hold less than the 4 KiB that a kernel's arguments may have.
constexpr int kWords = 1000;

struct TableWords {
  uint32_t* to;
  int count;
  uint32_t word[kWords];
};

__global__ void __launch_bounds__(kElementThreads)
    write_table_kernel(const __grid_constant__ TableWords params) {
  const int64_t i = element_index();
  if (i < params.count) params.to[i] = params.word[i];
}

}  // namespace

void write_table(void* to, const void* from, int64_t bytes, Stream stream) {
  for (int64_t at = 0; at < bytes; at += kWords * 4) {
    const int64_t size = smaller(bytes - at, kWords * 4);
    TableWords params{static_cast<uint32_t*>(to) + at / 4, static_cast<int>(size / 4), {}};
    memcpy(params.word, static_cast<const char*>(from) + at, static_cast<size_t>(size));
    launch_elements(write_table_kernel, params.count, stream, params);
  }
}

}  // namespace lora_ext
