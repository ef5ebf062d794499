// TMA: copies of boxes of a matrix by one thread, to shared memory counted by an mbarrier, from
// there in groups that the thread waits for.
#pragma once

#include <cstring>

#include "kernels/arch/descriptor_sm90.h"
#include "simt/mbarrier.h"

namespace lora_ext::arch {

// A matrix of 16-bit elements and the box that one instruction copies.
struct alignas(64) TensorMap {
  const uint8_t* data;
  int64_t rows, columns, stride_bytes;
  int box_rows, box_columns;
  Swizzle swizzle;
};

// As cuTensorMapEncodeTiled; CUDA_SUCCESS or CUDA_ERROR_INVALID_VALUE.
template <class T>
inline int encode_tensor_map(TensorMap& map, const T* data, int64_t rows, int64_t columns,
                             int64_t stride, int box_rows, int box_columns, Swizzle swizzle) {
  static_assert(sizeof(T) == 2);
  constexpr int kMostInBox = 256;
  constexpr int64_t kMostSize = int64_t{1} << 32, kMostStride = int64_t{1} << 40;
  const int row_bytes = box_columns * 2;
  const bool valid = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * 2 % 16 == 0 &&
                     stride * 2 < kMostStride && rows >= 1 && rows <= kMostSize && columns >= 1 &&
                     columns <= kMostSize && box_rows >= 1 && box_rows <= kMostInBox &&
                     box_columns >= 1 && box_columns <= kMostInBox && row_bytes % 16 == 0 &&
                     (swizzle == Swizzle::kNone || row_bytes <= swizzle_bytes(swizzle));
  ++simt::questions();
  if (!valid) return 1;
  map = {reinterpret_cast<const uint8_t*>(data),
         rows,
         columns,
         stride * 2,
         box_rows,
         box_columns,
         swizzle};
  return 0;
}

inline void tma_prefetch(const TensorMap&) {}

// One row of the box, zero outside of the matrix.
inline void copy_box_row(const TensorMap& map, int64_t row, int64_t column, uint8_t* out) {
  for (int i = 0; i < map.box_columns; ++i) {
    const bool inside = row >= 0 && row < map.rows && column + i >= 0 && column + i < map.columns;
    if (inside) {
      std::memcpy(out + i * 2, map.data + row * map.stride_bytes + (column + i) * 2, 2);
    } else {
      std::memset(out + i * 2, 0, 2);
    }
  }
}

// Into one block's shared memory, at the time that the emulator chooses.
inline void start_load(simt::Block& into, uint32_t shared, const TensorMap& map, uint32_t barrier,
                       int column, int row) {
  simt::Block& issuer = simt::block();
  const int row_bytes = map.box_columns * 2, bytes = row_bytes * map.box_rows;
  issuer.check(!into.ended(), "TMA writes to the shared memory of a block that has ended");
  issuer.check(into.shared.contains(shared, static_cast<size_t>(bytes)),
               "tma_load_2d: outside of shared memory");
  issuer.check(simt::mbarrier_at({into, barrier}).fenced,
               "tma_load_2d: no fence after the mbarrier was initialised");
  into.check_fenced(shared, static_cast<size_t>(bytes), "tma_load_2d writes");

  // The map may be a parameter on the stack of a thread that is gone when the copy takes effect.
  auto transfer = [&into, map, shared, barrier, column, row, row_bytes, bytes] {
    if (into.ended())
      throw simt::Error("TMA writes to the shared memory of a block that has ended");
    uint8_t values[512];
    for (int r = 0; r < map.box_rows; ++r) {
      copy_box_row(map, int64_t{row} + r, column, values);
      for (int i = 0; i < row_bytes; i += 16) {
        const auto address = shared + static_cast<uint32_t>(r * row_bytes + i);
        std::memcpy(into.shared.at(swizzled(address, map.swizzle)), values + i, 16);
      }
    }
    into.stored_asynchronously(shared, static_cast<size_t>(bytes));
    into.counts.tma_bytes += bytes;
    simt::Mbarrier& state = simt::mbarrier_at({into, barrier});
    state.bytes -= bytes;
    state.complete_phase_if_done();
  };
  if (issuer.options.copies == simt::Completion::kEager) {
    transfer();
  } else {
    into.transfers.push_back(std::move(transfer));
  }
}

// `blocks`: a bit for each of the cluster that gets the box.
inline void start_loads(uint32_t shared, const TensorMap& map, uint32_t barrier, int column,
                        int row, uint32_t blocks) {
  simt::Block& block = simt::block();
  const int row_bytes = map.box_columns * 2;
  block.check_previous_kernel("tma_load_2d");
  block.check(shared % 128 == 0, "tma_load_2d: the shared address is no multiple of 128");
  block.check(map.swizzle == Swizzle::kNone || row_bytes == swizzle_bytes(map.swizzle),
              "tma_load_2d: rows narrower than the swizzle are not emulated");
  block.check(blocks != 0 && blocks >> block.cluster->size() == 0,
              "tma_load_2d: a mask of blocks that the cluster has not");
  for (int rank = 0; rank < block.cluster->size(); ++rank) {
    if (blocks >> rank & 1) {
      start_load(block.cluster->block(rank), shared, map, barrier, column, row);
    }
  }
  block.counts.tma_read_bytes += row_bytes * map.box_rows;
  block.preempt();
}

inline void tma_load_2d(uint32_t shared, const TensorMap& map, uint32_t barrier, int column,
                        int row) {
  start_loads(shared, map, barrier, column, row, 1u << simt::block().rank);
}

inline void tma_load_2d_multicast(uint32_t shared, const TensorMap& map, uint32_t barrier,
                                  int column, int row, uint32_t blocks) {
  start_loads(shared, map, barrier, column, row, blocks);
}

inline void tma_store_2d(const TensorMap& map, uint32_t shared, int column, int row) {
  simt::Block& block = simt::block();
  const int row_bytes = map.box_columns * 2, bytes = row_bytes * map.box_rows;
  block.check_previous_kernel("tma_store_2d");
  block.check(shared % 128 == 0, "tma_store_2d: the shared address is no multiple of 128");
  block.check(block.shared.contains(shared, static_cast<size_t>(bytes)),
              "tma_store_2d: outside of shared memory");
  block.check(map.swizzle == Swizzle::kNone || row_bytes == swizzle_bytes(map.swizzle),
              "tma_store_2d: rows narrower than the swizzle are not emulated");
  block.check_fenced(shared, static_cast<size_t>(bytes), "tma_store_2d reads");

  auto store = [&block, map, shared, column, row] {
    const int row_bytes = map.box_columns * 2;
    for (int r = 0; r < map.box_rows; ++r) {
      for (int i = 0; i < map.box_columns; ++i) {
        const int64_t m = int64_t{row} + r, n = int64_t{column} + i;
        if (m < 0 || m >= map.rows || n < 0 || n >= map.columns) continue;
        const auto address =
            swizzled(shared + static_cast<uint32_t>(r * row_bytes + i * 2), map.swizzle);
        std::memcpy(const_cast<uint8_t*>(map.data) + m * map.stride_bytes + n * 2,
                    block.shared.at(address), 2);
        block.counts.tma_stored_bytes += 2;
      }
    }
  };
  if (block.options.copies == simt::Completion::kEager) {
    store();
  } else {
    block.thread().stores.push_back({std::move(store), block.thread().store_group});
  }
  block.preempt();
}

inline void tma_store_commit() {
  ++simt::block().thread().store_group;
  simt::block().preempt();
}

template <int kGroups>
inline void tma_store_wait_read() {
  simt::Thread& thread = simt::block().thread();
  std::erase_if(thread.stores, [&](const simt::BoxStore& store) {
    const bool over = store.group + kGroups < thread.store_group;
    if (over) store.run();
    return over;
  });
  simt::block().preempt();
}

}  // namespace lora_ext::arch
