// The emulated instructions against what they are documented to do, written as plainly as possible.

#include "check.h"

namespace {

using namespace lora_ext;
using namespace simt_test;

// ---- cp.async ----------------------------------------------------------------------------------

struct CopyParams {
  const uint8_t* source;
  uint8_t* out;  // [17][16]
};

// Thread t copies t bytes.
__global__ void copy_kernel(CopyParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* mine = shared + thread * 16;
  if (thread <= 16) {
    arch::cp_async_16(arch::shared_address(mine), params.source, thread);
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
    memcpy(params.out + thread * 16, mine, 16);
  }
}

CASE(cp_async_fills_with_zero) {
  alignas(16) uint8_t source[16];
  for (int i = 0; i < 16; ++i) source[i] = static_cast<uint8_t>(i + 1);
  for_each_schedule([&] {
    std::vector<uint8_t> out(17 * 16, 0xFF);
    arch::launch(copy_kernel, 1, 32, 32 * 16, nullptr, CopyParams{source, out.data()});
    for (int bytes = 0; bytes <= 16; ++bytes) {
      for (int i = 0; i < 16; ++i) EXPECT(out[bytes * 16 + i] == (i < bytes ? i + 1 : 0));
    }
    EXPECT(simt::statistics().copied_bytes == 16 * 17 / 2);
  });
}

CASE(cp_async_reads_nothing_beyond) {
  const std::vector<uint8_t> one(16, 7);  // AddressSanitizer watches its end
  std::vector<uint8_t> out(17 * 16);
  arch::launch(copy_kernel, 1, 32, 32 * 16, nullptr, CopyParams{one.data(), out.data()});
  EXPECT(out[16 * 16 + 15] == 7);
}

// ---- ldmatrix ----------------------------------------------------------------------------------

struct LdmatrixParams {
  const uint16_t* matrices;  // [4][8][8]
  uint32_t* out;             // [32][4]
  int row_bytes;             // from a row to the next in shared memory
};

template <bool kTranspose>
__global__ void ldmatrix_kernel(LdmatrixParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  uint8_t* row = shared + lane * params.row_bytes;  // row lane % 8 of matrix lane / 8
  memcpy(row, params.matrices + lane * 8, 16);
  __syncwarp();
  uint32_t out[4];
  arch::ldmatrix_x4<kTranspose>(out, arch::shared_address(row));
  memcpy(params.out + lane * 4, out, sizeof(out));
}

template <bool kTranspose>
void check_ldmatrix(int row_bytes, int64_t conflicts) {
  std::vector<uint16_t> matrices(4 * 8 * 8);
  for (size_t i = 0; i < matrices.size(); ++i) matrices[i] = static_cast<uint16_t>(i);
  std::vector<uint32_t> out(32 * 4);
  arch::launch(ldmatrix_kernel<kTranspose>, 1, 32, 32 * row_bytes, nullptr,
               LdmatrixParams{matrices.data(), out.data(), row_bytes});
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        const int expected = m * 64 + (kTranspose ? column * 8 + row : row * 8 + column);
        EXPECT((out[lane * 4 + m] >> (i * 16) & 0xFFFF) == static_cast<uint32_t>(expected));
      }
    }
  }
  EXPECT(simt::statistics().ldmatrix_phases == 4);
  EXPECT(simt::statistics().ldmatrix_conflicts == conflicts);
}

CASE(ldmatrix) {
  for_each_schedule([] { check_ldmatrix<false>(16, 0); });
  for_each_schedule([] { check_ldmatrix<true>(16, 0); });
}

CASE(ldmatrix_counts_bank_conflicts) {
  check_ldmatrix<false>(144, 0);      // rows one chunk apart
  check_ldmatrix<false>(128, 4 * 7);  // all in the same banks
  check_ldmatrix<false>(32, 4 * 1);   // two in each
}

// ---- mma ---------------------------------------------------------------------------------------

template <class T>
struct MmaParams {
  const T* a;      // [16, 16]
  const T* b;      // [16, 8]
  const float* c;  // [16, 8]
  float* out;      // [16, 8]
};

template <class T>
__global__ void mma_kernel(MmaParams<T> params) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i % 2), column = 2 * (lane % 4) + 8 * (i / 2);
    memcpy(&a[i], params.a + row * 16 + column, 4);
  }
  for (int i = 0; i < 2; ++i) {
    const T* first = params.b + (2 * (lane % 4) + 8 * i) * 8 + lane / 4;
    b[i] = uint32_t{first[0].bits} | uint32_t{first[8].bits} << 16;
  }
  const auto place = [&](int i) { return (lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2; };
  for (int i = 0; i < 4; ++i) c[i] = params.c[place(i)];
  arch::mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; ++i) params.out[place(i)] = c[i];
}

template <class T>
void check_mma() {
  const auto a = normal_values<T>(16 * 16, 1), b = normal_values<T>(16 * 8, 2);
  const auto c = normal_values<float>(16 * 8, 3);
  std::vector<float> out(16 * 8, kNan);
  arch::launch(mma_kernel<T>, 1, 32, 0, nullptr,
               MmaParams<T>{a.data(), b.data(), c.data(), out.data()});
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double expected = c[m * 8 + n];
      for (int k = 0; k < 16; ++k) {
        expected += double{to_float(a[m * 16 + k])} * to_float(b[k * 8 + n]);
      }
      EXPECT(std::fabs(out[m * 8 + n] - expected) < 1e-5);
    }
  }
  EXPECT(simt::statistics().mma == 1);
}

CASE(mma) {
  check_mma<Bf16>();
  check_mma<Fp16>();
}

// ---- Shuffles and votes ------------------------------------------------------------------------

struct Values {
  int* out;
};

// Each lane's value is its number.
__global__ void shuffle_kernel(Values params) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto put = [&](int row, int value) { params.out[row * 32 + lane] = value; };
  put(0, __shfl_sync(0xFFFFFFFFu, lane, 5));
  put(1, __shfl_sync(0xFFFFFFFFu, lane, (lane + 1) % 32));
  put(2, __shfl_sync(0xFFFFFFFFu, lane, 3, 8));
  put(3, __shfl_xor_sync(0xFFFFFFFFu, lane, 16));
  put(4, __shfl_down_sync(0xFFFFFFFFu, lane, 4));
  put(5, __shfl_down_sync(0xFFFFFFFFu, lane, 1, 4));
  put(6, __shfl_up_sync(0xFFFFFFFFu, lane, 2));
  put(7, static_cast<int>(__ballot_sync(0xFFFFFFFFu, lane % 3 == 0)));
  // Both halves of the warp on their own
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  put(8, static_cast<int>(__shfl_xor_sync(half, double{1.5} * lane, 1) * 2));
}

CASE(shuffles) {
  for_each_schedule([] {
    std::vector<int> out(9 * 32, -1);
    arch::launch(shuffle_kernel, 1, 32, 0, nullptr, Values{out.data()});
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= unsigned{lane % 3 == 0} << lane;
    for (int lane = 0; lane < 32; ++lane) {
      const auto got = [&](int row) { return out[static_cast<size_t>(row * 32 + lane)]; };
      EXPECT(got(0) == 5);
      EXPECT(got(1) == (lane + 1) % 32);
      EXPECT(got(2) == lane / 8 * 8 + 3);
      EXPECT(got(3) == (lane ^ 16));
      EXPECT(got(4) == (lane + 4 < 32 ? lane + 4 : lane));
      EXPECT(got(5) == (lane % 4 < 3 ? lane + 1 : lane));
      EXPECT(got(6) == (lane >= 2 ? lane - 2 : lane));
      EXPECT(static_cast<unsigned>(got(7)) == votes);
      EXPECT(got(8) == 3 * (lane ^ 1));
    }
  });
}

// ---- Barriers, blocks, atomics -----------------------------------------------------------------

// Adds the numbers of the threads by halving, then the last block adds the blocks.
struct SumParams {
  int* block_sums;
  unsigned* finished;
  int* out;
};

__global__ void sum_kernel(SumParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* sums = reinterpret_cast<int*>(shared);
  const unsigned thread = threadIdx.x;
  sums[thread] = static_cast<int>(blockIdx.x * blockDim.x + thread);
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread != 0) return;
  params.block_sums[blockIdx.x] = sums[0];
  __threadfence();
  if (atomicAdd(params.finished, 1u) + 1 == gridDim.x) {
    for (unsigned i = 0; i < gridDim.x; ++i) *params.out += params.block_sums[i];
  }
}

CASE(barriers_and_atomics) {
  constexpr int kBlocks = 7, kThreads = 128;
  for_each_schedule([] {
    std::vector<int> block_sums(kBlocks);
    unsigned finished = 0;
    int out = 0;
    arch::launch(sum_kernel, kBlocks, kThreads, kThreads * 4, nullptr,
                 SumParams{block_sums.data(), &finished, &out});
    EXPECT(out == kBlocks * kThreads * (kBlocks * kThreads - 1) / 2);
  });
}

__global__ void index_kernel(Values params) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  atomicAdd(params.out + block, static_cast<int>(threadIdx.x));
}

CASE(every_block_runs_once) {
  for_each_schedule([] {
    std::vector<int> out(2 * 3 * 4);
    arch::launch(index_kernel, dim3(2, 3, 4), 33, 0, nullptr, Values{out.data()});
    for (const int sum : out) EXPECT(sum == 32 * 33 / 2);
  });
}

}  // namespace
