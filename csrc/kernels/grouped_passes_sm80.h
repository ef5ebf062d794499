// The low-rank passes of sm_80 over rows that a list names, of all slots in one launch: h, dh and
// dB, dA. Blocks are those of lora_linear's passes, with the rows of one slot and its own ranks.
#pragma once

#include "grouped_slots.h"
#include "low_rank_down_grad_sm80.h"
#include "low_rank_up_grad_sm80.h"

namespace lora_ext::sm80 {

constexpr int kMostListed = 2048;  // rows of a block

template <class T>
struct GroupedPass {
  const GroupedSlot<T>* slots;
  const GroupedWork* work;  // of each blockIdx.x
  const int* order;
  Matrix<T> rows;   // x [M, K] or dy [M, N]
  float* parts;     // of h along K, or of dh along N: so many elements each
  int64_t part;     // how many
  int splits;       // blocks along K, of h
  int columns;      // of a block, of dh and dB
  T* value;         // h or dh as an operand: of dB or dA
  T* remainder;     // of its rounding
  int list_offset;  // in shared memory
};

template <class T, int kColumns>
__global__ void __launch_bounds__(128, kLeastBlocks)
    grouped_down_sm80_kernel(const __grid_constant__ GroupedPass<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const GroupedWork work = params.work[blockIdx.x];
  const GroupedSlot<T>& slot = params.slots[work.slot];
  const ListedRows rows{list_rows(shared + params.list_offset, params.order + work.begin, work.rows,
                                  static_cast<int>(threadIdx.x), 128)};
  const DownParams<T> own{
      .x = {params.rows.data, work.rows, params.rows.columns, params.rows.stride},
      .A = part_of(slot.A, work.first * slot.A.value.stride, work.ranks, params.rows.columns),
      .aligned = true,
      .dropout = slot.dropout,
      .splits = params.splits,
      .rank = work.ranks,
      .stride = slot.padded,
      .partial = nullptr};
  down_tile<T, kColumns>(
      own, rows, 0, shared,
      params.parts + blockIdx.y * params.part + slot.operand_at(work.begin, work.first));
}

template <class T, int kRank>
__global__ void __launch_bounds__(128, kLeastBlocks)
    grouped_up_grad_sm80_kernel(const __grid_constant__ GroupedPass<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const GroupedWork work = params.work[blockIdx.x];
  const GroupedSlot<T>& slot = params.slots[work.slot];
  const ListedRows rows{list_rows(shared + params.list_offset, params.order + work.begin, work.rows,
                                  static_cast<int>(threadIdx.x), 128)};
  const bool wants_dB = is_wanted(slot.dB) || is_wanted(slot.dlora_bias);
  UpGradParams<T> own{.dy = {params.rows.data, work.rows, params.rows.columns, params.rows.stride},
                      .B = part_of(slot.B, work.first, params.rows.columns, work.ranks),
                      .rank = work.ranks,
                      .stride = slot.padded,
                      .h = {},
                      .aligned = true,
                      .rows_per_block = 0,
                      .columns_per_block = params.columns,
                      .dh = nullptr,
                      .dB = nullptr};
  if (wants_dB) own.h = operand_of(params.value, params.remainder, slot, work);
  float* const dh = slot.wants_dh ? params.parts + blockIdx.y * params.part +
                                        slot.operand_at(work.begin, work.first)
                                  : nullptr;
  up_grad_tile<T, kRank>(own, rows, 0, work.rows, int64_t{blockIdx.y} * params.columns, shared, dh,
                         wants_dB, [&](int64_t column, int64_t rank, float sum) {
                           rank += work.first;
                           if (work.part) {
                             work.part[column * slot.width + rank] = sum;
                           } else if (rank == slot.r) {
                             if (is_wanted(slot.dlora_bias))
                               slot.dlora_bias.store(sum, slot.scaling, column);
                           } else if (is_wanted(slot.dB)) {
                             slot.dB.store(sum, slot.scaling, column * slot.r + rank);
                           }
                         });
}

template <class T, int kRank>
__global__ void __launch_bounds__(128, kLeastBlocks)
    grouped_down_grad_sm80_kernel(const __grid_constant__ GroupedPass<T> params) {
  LORA_EXT_DYNAMIC_SHARED(shared);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const GroupedWork work = params.work[blockIdx.x];
  const GroupedSlot<T>& slot = params.slots[work.slot];
  const ListedRows rows{list_rows(shared + params.list_offset, params.order + work.begin, work.rows,
                                  static_cast<int>(threadIdx.x), 128)};
  const int64_t K = params.rows.columns;
  const DownGradParams<T> own{.x = {params.rows.data, work.rows, K, params.rows.stride},
                              .dh = operand_of(params.value, params.remainder, slot, work),
                              .rank = work.ranks,
                              .stride = 0,
                              .aligned = true,
                              .dropout = slot.dropout,
                              .kept = {},
                              .rows_per_block = 0,
                              .dA = nullptr};
  down_grad_tile<T, kRank>(own, rows, 0, work.rows, blockIdx.y, shared,
                           [&](int row, int64_t column, float sum) {
                             const int64_t at = (work.first + row) * K + column;
                             if (work.part) {
                               work.part[at] = sum;
                             } else {
                               slot.dA.store(sum, 1.0f, at);
                             }
                           });
}

}  // namespace lora_ext::sm80
