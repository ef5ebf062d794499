// Bytes as arguments of kernels: as many launches as it takes.
#include "elementwise.h"
#include "write_table.h"

namespace lora_ext {

// With what else they hold less than a kernel's arguments may have: 4 KiB, and nearly 32 since
// CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kPieces = 250;
#else
constexpr int kPieces = 2000;
#endif
// Threads of a warp read one argument after another: few of them for each multiprocessor.
constexpr int kTableThreads = 64;

struct alignas(16) TablePiece {
  uint32_t word[4];
};
struct TablePieces {
  TablePiece* to;
  int count;
  TablePiece piece[kPieces];
};

__global__ void __launch_bounds__(kTableThreads)
    write_table_kernel(const __grid_constant__ TablePieces params) {
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const int i = static_cast<int>(blockIdx.x * kTableThreads + threadIdx.x);
  if (i < params.count) params.to[i] = params.piece[i];
}

void write_table(void* to, const void* from, int64_t bytes, Stream stream) {
  constexpr int64_t kSize = sizeof(TablePiece);
  TablePieces params;
  for (int64_t at = 0; at < bytes; at += kPieces * kSize) {
    const int64_t size = smaller(bytes - at, kPieces * kSize);
    params.to = static_cast<TablePiece*>(to) + at / kSize;
    params.count = static_cast<int>(size / kSize);
    memcpy(params.piece, static_cast<const char*>(from) + at, static_cast<size_t>(size));
    arch::launch_dependent(write_table_kernel,
                           dim3(static_cast<unsigned>(ceil_div(params.count, kTableThreads))),
                           kTableThreads, 0, stream, params);
  }
}

}  // namespace lora_ext
