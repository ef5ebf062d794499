// What leaves shared memory on sm_90: stmatrix and TMA stores, and mistakes with them.

#include "check.h"

namespace {

using namespace lora_ext;
using namespace simt_test;
using arch::Swizzle;

constexpr int kRows = 16, kColumns = 64, kBoxBytes = kRows * kColumns * 2;

// ---- stmatrix ----------------------------------------------------------------------------------

struct StmatrixParams {
  uint16_t* out;  // [4][8][8]
  int row_bytes;  // from a row to the next in shared memory
};

// Element (row, column) of matrix m is m * 64 + row * 8 + column.
__global__ void stmatrix_kernel(StmatrixParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t in[4];
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto first = static_cast<uint32_t>(matrix * 64 + lane / 4 * 8 + lane % 4 * 2);
    in[matrix] = first | (first + 1) << 16;
  }
  const uint8_t* row = shared + lane * params.row_bytes;
  arch::stmatrix_x4(arch::shared_address(row), in);
  __syncwarp();
  memcpy(params.out + lane * 8, row, 16);
}

CASE(stmatrix) {
  constexpr int kRowBytes[] = {16, 128}, kConflicts[] = {0, 4 * 7};
  for (const int i : {0, 1}) {
    for_each_schedule([&] {
      std::vector<uint16_t> out(256, 0xFFFF);
      arch::launch(stmatrix_kernel, 1, 32, 32 * kRowBytes[i], nullptr,
                   StmatrixParams{out.data(), kRowBytes[i]});
      for (size_t element = 0; element < 256; ++element) EXPECT(out[element] == element);
      EXPECT(simt::statistics().stmatrix_conflicts == kConflicts[i]);
    });
  }
}

// ---- TMA stores --------------------------------------------------------------------------------

enum class Mistake { kNone, kFilledTooEarly, kNoFence, kNoWait, kOtherLanesUnfenced };

struct StoreParams {
  arch::TensorMap map;
  int row, column;
};

// Two boxes of rising numbers, the second 64 columns to the right, through the same shared memory.
template <Mistake kMistake>
__global__ void store_kernel(const __grid_constant__ StoreParams params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  const uint32_t box = arch::shared_address(shared);
  const int lane = static_cast<int>(threadIdx.x);
  for (int number = 0; number < 2; ++number) {
    if (lane == 0 && kMistake != Mistake::kFilledTooEarly) arch::tma_store_wait_read<0>();
    __syncwarp();
    for (int i = lane; i < kRows * kColumns; i += 32) {
      const uint32_t at = arch::swizzled(box + static_cast<uint32_t>(i) * 2, Swizzle::k128) - box;
      const auto value = static_cast<uint16_t>(number * kRows * kColumns + i + 1);
      memcpy(shared + at, &value, 2);
    }
    const bool fences =
        kMistake == Mistake::kOtherLanesUnfenced ? lane == 0 : kMistake != Mistake::kNoFence;
    if (fences) arch::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      arch::tma_store_2d(params.map, box, params.column + number * kColumns, params.row);
      arch::tma_store_commit();
    }
  }
  if (lane == 0 && kMistake != Mistake::kNoWait) arch::tma_store_wait_read<0>();
}

// Whether a matrix [20, 136], whose rows lie 144 apart, has what both boxes bring and else what was
// there.
template <Mistake kMistake>
bool stores_are_right(int row, int column) {
  constexpr int kM = 20, kN = 136, kStride = 144;
  alignas(16) std::vector<uint16_t> matrix(kM * kStride, 0xFFFF);
  StoreParams params{{}, row, column};
  const auto* data = reinterpret_cast<const Bf16*>(matrix.data());
  EXPECT(arch::encode_tensor_map(params.map, data, kM, kN, kStride, kRows, kColumns,
                                 Swizzle::k128) == 0);
  arch::launch(store_kernel<kMistake>, 1, 32, kBoxBytes, nullptr, params);
  int64_t stored = 0;
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kStride; ++n) {
      const int r = m - row, c = n - column;
      const bool inside = n < kN && r >= 0 && r < kRows && c >= 0 && c < 2 * kColumns;
      const int value = c / kColumns * kRows * kColumns + r * kColumns + c % kColumns + 1;
      if (matrix[m * kStride + n] != (inside ? value : 0xFFFF)) return false;
      stored += inside;
    }
  }
  return simt::statistics().tma_stored_bytes == 2 * stored;
}

CASE(tma_store_leaves_out_what_is_outside) {
  for_each_schedule([] {
    for (const int row : {-3, 0, 8}) {
      for (const int column : {-8, 0, 16, 80})
        EXPECT(stores_are_right<Mistake::kNone>(row, column));
    }
  });
}

CASE(a_box_filled_before_it_is_read) {
  const auto caught =
      schedules_that_catch([] { return stores_are_right<Mistake::kFilledTooEarly>(0, 0); });
  EXPECT(caught > 0);
}

CASE(an_end_before_all_is_read) {
  expect_error([] { stores_are_right<Mistake::kNoWait>(0, 0); },
               {"thread 0 ends without having waited for its TMA stores"});
}

CASE(boxes_that_nobody_fenced) {
  expect_error([] { stores_are_right<Mistake::kNoFence>(0, 0); },
               {"tma_store_2d reads shared memory that a thread stored to"});
  simt::options().watch_stores = true;
  EXPECT(stores_are_right<Mistake::kNone>(0, 0));
  expect_error([] { stores_are_right<Mistake::kOtherLanesUnfenced>(0, 0); },
               {"tma_store_2d reads shared memory that thread", "without fence_proxy_async"});
}

}  // namespace
