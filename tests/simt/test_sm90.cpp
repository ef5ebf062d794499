// TMA, mbarriers and wgmma: right, and with planted mistakes.

#include <cstdint>

#include "check.h"
#include "sm90_kernels.h"

namespace {

using namespace simt_test;

template <class T>
arch::TensorMap tensor_map(const std::vector<T>& matrix, int64_t rows, int64_t columns,
                           int box_rows, int box_columns, Swizzle swizzle) {
  arch::TensorMap map;
  EXPECT(arch::encode_tensor_map(map, matrix.data(), rows, columns, columns, box_rows, box_columns,
                                 swizzle) == 0);
  return map;
}

// ---- TMA ---------------------------------------------------------------------------------------

struct BoxParams {
  arch::TensorMap map;
  int row, column;
  uint16_t* out;  // [16, 64] as they lie in shared memory
};

__global__ void box_kernel(const __grid_constant__ BoxParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const uint32_t box = arch::shared_address(shared), barrier = box + 2048;
  if (threadIdx.x == 0) {
    arch::mbarrier_init(barrier, 1);
    arch::fence_mbarrier_init();
    arch::mbarrier_arrive_expect_tx(barrier, 2048);
    arch::tma_load_2d(box, params.map, barrier, params.column, params.row);
  }
  __syncthreads();
  arch::mbarrier_wait(barrier, 0);
  memcpy(params.out + threadIdx.x * 32, shared + threadIdx.x * 64, 64);
}

CASE(tma_swizzles_and_fills_with_zero) {
  constexpr int kRows = 20, kColumns = 72;
  std::vector<uint16_t> matrix(kRows * kColumns);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  for_each_schedule([&] {
    for (const int row : {-3, 0, 8}) {
      for (const int column : {-5, 0, 16}) {
        std::vector<uint16_t> out(16 * 64, 0xFFFF);
        BoxParams params{tensor_map(matrix, kRows, kColumns, 16, 64, Swizzle::k128), row, column,
                         out.data()};
        arch::launch(box_kernel, 1, 32, 2048 + 8, nullptr, params);
        for (int r = 0; r < 16; ++r) {
          for (int c = 0; c < 64; ++c) {
            const int i = row + r, j = column + c;
            const bool inside = i >= 0 && i < kRows && j >= 0 && j < kColumns;
            const int chunk = c / 8 ^ r % 8;
            EXPECT(out[r * 64 + chunk * 8 + c % 8] == (inside ? i * kColumns + j + 1 : 0));
          }
        }
        EXPECT(simt::statistics().tma_bytes == 2048);
      }
    }
  });
}

CASE(tma_before_the_previous_kernel_is_over) {
  const std::vector<uint16_t> matrix(16 * 64);
  std::vector<uint16_t> out(16 * 64);
  const BoxParams params{tensor_map(matrix, 16, 64, 16, 64, Swizzle::k128), 0, 0, out.data()};
  arch::launch(box_kernel, 1, 32, 2048 + 8, nullptr, params);
  expect_error([&] { arch::launch_dependent(box_kernel, 1, 32, 2048 + 8, nullptr, params); },
               {"tma_load_2d without wait_for_previous_kernel"});
}

CASE(tensor_maps_that_the_driver_refuses) {
  const std::vector<uint16_t> matrix(4096);
  arch::TensorMap map;
  const auto encode = [&](int offset, int stride, int box_rows, int box_columns) {
    return arch::encode_tensor_map(map, matrix.data() + offset, 16, 64, stride, box_rows,
                                   box_columns, Swizzle::k128);
  };
  EXPECT(encode(0, 64, 16, 64) == 0);
  EXPECT(encode(1, 64, 16, 64) != 0);
  EXPECT(encode(0, 65, 16, 64) != 0);
  EXPECT(encode(0, 64, 257, 64) != 0);
  EXPECT(encode(0, 64, 16, 128) != 0);
}

// ---- wgmma: every way in which operands may lie ------------------------------------------------

constexpr int kTileN = 64;

template <class T>
struct LayoutParams {
  arch::TensorMap a, b;
  Swizzle swizzle;
  const T* a_rows;  // [64, 16] or null: A is read from shared memory
  float* out;       // [64, kTileN]
};

// An operand of `rows` rows (of A, or columns of B) and 16 k: boxes as wide as the swizzle, one
// after the other. Returns the descriptor.
LORA_EXT_DEVICE uint64_t load_operand(const arch::TensorMap& map, Major major, Swizzle swizzle,
                                      int rows, uint32_t shared, uint32_t barrier, bool loads) {
  const int width = arch::swizzle_bytes(swizzle), columns = width / 2;
  const int wide = major == Major::kK ? 16 : rows, high = major == Major::kK ? rows : 16;
  const auto box_bytes = static_cast<uint32_t>(high * width);
  const int boxes = (wide + columns - 1) / columns;
  if (loads) {
    arch::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(boxes) * box_bytes);
    for (int box = 0; box < boxes; ++box) {
      arch::tma_load_2d(shared + static_cast<uint32_t>(box) * box_bytes, map, barrier,
                        box * columns, 0);
    }
  }
  const auto group = static_cast<uint32_t>(8 * width);
  if (swizzle == Swizzle::kNone && major == Major::kMN) {
    return arch::wgmma_descriptor(shared, group, box_bytes, swizzle);
  }
  return arch::wgmma_descriptor(shared, box_bytes, group, swizzle);
}

template <class T, Major kMajorA, Major kMajorB>
__global__ void layout_kernel(const __grid_constant__ LayoutParams<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t a = arch::shared_address(shared), b = a + 8192, barrier = b + 8192;
  if (thread == 0) {
    arch::mbarrier_init(barrier, 2);
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  const bool loads = thread == 0;
  const uint64_t first = load_operand(params.a, kMajorA, params.swizzle, 64, a, barrier, loads);
  const uint64_t second =
      load_operand(params.b, kMajorB, params.swizzle, kTileN, b, barrier, loads);
  arch::mbarrier_wait(barrier, 0);
  float sums[kTileN / 2];
  arch::wgmma_fence();
  if (params.a_rows != nullptr) {
    uint32_t registers[4];
    for (int i = 0; i < 4; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
      memcpy(&registers[i], params.a_rows + row * 16 + thread % 4 * 2 + i / 2 * 8, 4);
    }
    arch::wgmma<T, kTileN, kMajorB>(sums, registers, second, false);
  } else {
    arch::wgmma<T, kTileN, kMajorA, kMajorB>(sums, first, second, false);
  }
  arch::wgmma_commit();
  arch::wgmma_wait<0>();
  for (int i = 0; i < kTileN / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    params.out[row * kTileN + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

template <class T, Major kMajorA, Major kMajorB>
void check_layouts(bool a_in_registers) {
  const auto a = small_integers<T>(64 * 16, 1), b = small_integers<T>(16 * kTileN, 2);
  // As they lie in global memory: [row, k] or [k, row]
  const auto map = [](const std::vector<T>& matrix, Major major, int rows, Swizzle swizzle) {
    const bool k_major = major == Major::kK;
    return tensor_map(matrix, k_major ? rows : 16, k_major ? 16 : rows, k_major ? rows : 16,
                      arch::swizzle_bytes(swizzle) / 2, swizzle);
  };
  const auto at = [](const std::vector<T>& matrix, Major major, int rows, int row, int k) {
    return to_float(matrix[major == Major::kK ? row * 16 + k : k * rows + row]);
  };
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    std::vector<float> out(64 * kTileN, kNan);
    const LayoutParams<T> params{map(a, kMajorA, 64, swizzle), map(b, kMajorB, kTileN, swizzle),
                                 swizzle, a_in_registers ? a.data() : nullptr, out.data()};
    arch::launch(layout_kernel<T, kMajorA, kMajorB>, 1, 128, 2 * 8192 + 8, nullptr, params);
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < kTileN; ++column) {
        float expected = 0;
        for (int k = 0; k < 16; ++k) {
          expected += at(a, kMajorA, 64, row, k) * at(b, kMajorB, kTileN, column, k);
        }
        EXPECT(out[row * kTileN + column] == expected);
      }
    }
    EXPECT(simt::statistics().wgmma == 1);
  }
}

CASE(wgmma_reads_every_layout) {
  check_layouts<Bf16, Major::kK, Major::kK>(false);
  check_layouts<Bf16, Major::kK, Major::kMN>(false);
  check_layouts<Bf16, Major::kMN, Major::kK>(false);
  check_layouts<Fp16, Major::kMN, Major::kMN>(false);
}

CASE(wgmma_takes_a_from_registers) {
  check_layouts<Bf16, Major::kK, Major::kK>(true);
  check_layouts<Fp16, Major::kK, Major::kMN>(true);
}

// ---- The product kernel ------------------------------------------------------------------------

template <class T, Major kMajorB, Mistake kMistake = Mistake::kNone>
bool product_is_right(int M, int N, int K) {
  using P = Product<T, 64, kMajorB, kMistake>;
  const auto a = small_integers<T>(static_cast<size_t>(M * K), 1);
  const auto b = small_integers<T>(static_cast<size_t>(N * K), 2);
  const bool k_major = kMajorB == Major::kK;
  std::vector<float> out(static_cast<size_t>(M * N), kNan);
  ProductParams<T> params{};
  params.a = tensor_map(a, M, K, P::kM, P::kK, Swizzle::k128);
  params.b = tensor_map(b, k_major ? N : K, k_major ? K : N, P::kBoxRows, 64, Swizzle::k128);
  params.out = out.data();
  params.M = M, params.N = N, params.K = K;
  const dim3 grid(static_cast<unsigned>((N + 63) / 64), static_cast<unsigned>((M + 63) / 64));
  arch::launch(product_kernel<T, 64, kMajorB, kMistake>, grid, P::kThreads, P::kSharedBytes,
               nullptr, params);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float expected = 0;
      for (int k = 0; k < K; ++k) {
        expected += to_float(a[m * K + k]) * to_float(b[k_major ? n * K + k : k * N + n]);
      }
      if (out[m * N + n] != expected) return false;
    }
  }
  return true;
}

CASE(product) {
  for_each_schedule([] {
    EXPECT((product_is_right<Bf16, Major::kK>(37, 72, 328)));
    EXPECT((product_is_right<Fp16, Major::kMN>(37, 72, 136)));
  });
}

template <Mistake kMistake>
int schedules_that_catch_mistake() {
  return schedules_that_catch(
      [] { return product_is_right<Bf16, Major::kK, kMistake>(37, 40, 328); });
}

CASE(mbarrier_with_wrong_byte_count) {
  EXPECT(schedules_that_catch_mistake<Mistake::kWrongBytes>() == 16);
  expect_error([] { product_is_right<Bf16, Major::kK, Mistake::kWrongBytes>(8, 8, 64); },
               {"deadlock", "threads 128-255 wait in mbarrier_wait",
                "0 of 1 arrivals and -128 bytes to come"});
}

CASE(slot_released_before_it_was_read) {
  EXPECT(schedules_that_catch_mistake<Mistake::kReleasedEarly>() > 0);
}

CASE(producer_does_not_wait) {
  EXPECT(schedules_that_catch_mistake<Mistake::kNoWaitForEmpty>() > 0);
}

CASE(consumer_does_not_wait) {
  EXPECT(schedules_that_catch_mistake<Mistake::kNoWaitForFull>() > 0);
}

// ---- Stores that TMA and wgmma do not see ------------------------------------------------------

enum class Fence { kNone, kFirstThread, kEveryThread };

struct StoreParams {
  float* out;  // [128]
};

// Sums 16 products of one with one that threads have stored.
template <Fence kFence>
__global__ void store_kernel(StoreParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x);
  auto* values = reinterpret_cast<Bf16*>(shared);
  for (int i = thread; i < (64 + 16) * 16; i += 128) from_float(1.0f, values[i]);
  if (kFence == Fence::kEveryThread) arch::fence_proxy_async();
  __syncthreads();
  if (kFence == Fence::kFirstThread && thread == 0) arch::fence_proxy_async();
  __syncthreads();
  const uint32_t a = arch::shared_address(shared), b = a + 64 * 16 * 2;
  float sums[8];
  arch::wgmma_fence();
  arch::wgmma<Bf16, 16>(sums, arch::wgmma_descriptor(a, 0, 256, Swizzle::k32),
                        arch::wgmma_descriptor(b, 0, 256, Swizzle::k32), false);
  arch::wgmma_commit();
  arch::wgmma_wait<0>();
  params.out[thread] = sums[0];
}

template <Fence kFence>
void run_stores() {
  std::vector<float> out(128, kNan);
  arch::launch(store_kernel<kFence>, 1, 128, (64 + 16) * 32, nullptr, StoreParams{out.data()});
  for (const float sum : out) EXPECT(sum == 16.0f);
}

CASE(missing_proxy_fence) {
  run_stores<Fence::kEveryThread>();
  run_stores<Fence::kFirstThread>();
  expect_error([] { run_stores<Fence::kNone>(); },
               {"wgmma reads shared memory that a thread stored to without fence_proxy_async"});
  simt::options().watch_stores = true;
  run_stores<Fence::kEveryThread>();
  expect_error([] { run_stores<Fence::kFirstThread>(); },
               {"wgmma reads shared memory that thread", "stored to without fence_proxy_async"});
}

// ---- Named barriers ----------------------------------------------------------------------------

// The first warp hands numbers to the second one through shared memory, and does not wait for it.
template <bool kBarrier>
__global__ void handover_kernel(StoreParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    values[thread] = static_cast<float>(thread);
    if (kBarrier) arch::barrier_arrive(1, 64);
  } else if (thread < 64) {
    if (kBarrier) arch::barrier_sync(1, 64);
    params.out[thread - 32] = values[63 - thread];
  }
  __syncthreads();
}

template <bool kBarrier>
bool handover_is_right() {
  std::vector<float> out(32, kNan);
  arch::launch(handover_kernel<kBarrier>, 1, 96, 128, nullptr, StoreParams{out.data()});
  for (int i = 0; i < 32; ++i) {
    if (out[i] != static_cast<float>(31 - i)) return false;
  }
  return true;
}

CASE(named_barriers) {
  EXPECT(schedules_that_catch(handover_is_right<true>) == 0);
  EXPECT(schedules_that_catch(handover_is_right<false>) > 0);
}

// ---- Misuse ------------------------------------------------------------------------------------

enum class Misuse { kUninitialised, kUnfenced, kTooManyArrivals, kNoWgmmaFence, kNoWgmmaWait };

template <Misuse kMisuse>
__global__ void misuse_kernel(const __grid_constant__ BoxParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const uint32_t box = arch::shared_address(shared), barrier = box + 2048;
  if (kMisuse == Misuse::kNoWgmmaFence || kMisuse == Misuse::kNoWgmmaWait) {
    arch::fence_proxy_async();
    float sums[8];
    if (kMisuse == Misuse::kNoWgmmaWait) arch::wgmma_fence();
    const uint64_t descriptor = arch::wgmma_descriptor(box, 0, 256, Swizzle::k32);
    arch::wgmma<Bf16, 16>(sums, descriptor, descriptor, false);
    arch::wgmma_commit();
  } else if (threadIdx.x == 0) {
    if (kMisuse != Misuse::kUninitialised) arch::mbarrier_init(barrier, 1);
    arch::mbarrier_arrive_expect_tx(barrier, 2048);
    if (kMisuse == Misuse::kTooManyArrivals) arch::mbarrier_arrive(barrier);
    arch::tma_load_2d(box, params.map, barrier, 0, 0);
  }
}

template <Misuse kMisuse>
void expect_misuse_error(const std::string& part) {
  const std::vector<uint16_t> matrix(16 * 64);
  const BoxParams params{tensor_map(matrix, 16, 64, 16, 64, Swizzle::k128), 0, 0, nullptr};
  expect_error([&] { arch::launch(misuse_kernel<kMisuse>, 1, 128, 2048 + 8, nullptr, params); },
               {part});
}

CASE(misuse) {
  expect_misuse_error<Misuse::kUninitialised>("mbarrier: not initialised");
  expect_misuse_error<Misuse::kUnfenced>("no fence after the mbarrier was initialised");
  expect_misuse_error<Misuse::kTooManyArrivals>("more arrivals than it was made for");
  expect_misuse_error<Misuse::kNoWgmmaFence>("no wgmma_fence since the last wgmma_commit");
  expect_misuse_error<Misuse::kNoWgmmaWait>("without having waited for wgmma");
}

// ---- Shared memory of other blocks -------------------------------------------------------------

enum class Reading { kRight, kTooEarly, kFromNoBlock, kFromAnEndedBlock, kBetweenWords };

// Each of two blocks reads what the other one has stored.
template <Reading kReading>
__global__ void exchange_kernel(StoreParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), rank = arch::cluster_rank();
  const uint32_t own = arch::shared_address(shared), barriers = own + 512;
  reinterpret_cast<float*>(shared)[thread] = static_cast<float>(rank * 128 + thread);
  if (thread == 0) {
    for (uint32_t i = 0; i < 2; ++i) arch::mbarrier_init(barriers + 8 * i, 2 * 4);
    arch::fence_mbarrier_init();
  }
  arch::cluster_sync();
  const auto meet = [&](uint32_t barrier) {
    __syncwarp();
    const int lane = thread % 32;
    if (lane < 2) arch::mbarrier_arrive_cluster(arch::cluster_address(barrier, lane));
    if (kReading != Reading::kTooEarly) arch::mbarrier_wait_cluster(barrier, 0);
  };
  meet(barriers);
  if (kReading == Reading::kFromAnEndedBlock && rank == 1) return;
  const int other = kReading == Reading::kFromNoBlock ? 2 : 1 - rank;
  const uint32_t skipped = kReading == Reading::kBetweenWords ? 4 : 0;
  if (thread < 32) {
    const arch::Words words =
        arch::cluster_load_16(arch::cluster_address(own + thread * 16 + skipped, other));
    for (int i = 0; i < 4; ++i) {
      params.out[rank * 128 + thread * 4 + i] = bits_to_float(words.word[i]);
    }
  }
  if (kReading != Reading::kFromAnEndedBlock) meet(barriers + 8);
}

template <Reading kReading>
std::vector<float> exchange() {
  std::vector<float> out(256, kNan);
  arch::launch(exchange_kernel<kReading>, 2, 128, 512 + 16, nullptr, StoreParams{out.data()}, false,
               2);
  return out;
}

CASE(blocks_of_a_cluster_read_from_each_other) {
  for_each_schedule([] {
    const std::vector<float> out = exchange<Reading::kRight>();
    for (int i = 0; i < 256; ++i) EXPECT(out[i] == static_cast<float>((i + 128) % 256));
    EXPECT(simt::statistics().cluster_bytes == 2 * 512);
  });
  expect_error([] { exchange<Reading::kTooEarly>(); },
               {"cluster_load: the thread has not waited since it last arrived"});
  expect_error([] { exchange<Reading::kFromNoBlock>(); },
               {"an address of a block that the cluster has not"});
  expect_error([] { exchange<Reading::kBetweenWords>(); }, {"no multiple of its size"});
  EXPECT(schedules_that_catch([] {
           exchange<Reading::kFromAnEndedBlock>();
           return true;
         }) > 0);
}

}  // namespace
