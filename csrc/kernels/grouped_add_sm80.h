// out[rows] += h b for the rows that a list names, of all slots in one launch: y += h lora_B^T and
// dx += D(dh lora_A). h of a block's rows stays in shared memory; the block walks along its columns
// of out, which come and go once, 16 bytes at a time.
#pragma once

#include "grouped_slots.h"
#include "low_rank_down_sm80.h"

namespace lora_ext::sm80 {

template <class T>
struct GroupedAdd {
  const GroupedSlot<T>* slots;
  const GroupedWork* work;  // of each blockIdx.x; of all ranks of its slot
  const int* order;
  const float* factor;  // or null
  const T* operand;     // h or dh, times its strength
  T* out;               // [M, columns]
  int64_t columns;
  int columns_per_block;                               // whole blocks of dropout's decisions
  int stage_bytes, out_offset, h_offset, list_offset;  // of shared memory
};

// kLayout: b [columns, r] (lora_B) or [r, columns] (lora_A), to whose products dropout's mask
// applies.
template <int kRank, BLayout kLayout>
struct AddShape {
  static constexpr int kM = 64, kN = 64, kThreads = 128, kRing = kRank == 64 ? 2 : 3;
  using TileH = Tile<kM, kRank>;
  using TileB =
      Tile<kLayout == BLayout::kColumns ? kN : kRank, kLayout == BLayout::kColumns ? kRank : kN>;
  using TileOut = Tile<kM, kN>;

  // Of shared memory: `terms` of b, two if an adapter is in float, and so many groups of ranks.
  template <class Params>
  static constexpr int divide(Params& params, int terms, int groups) {
    params.stage_bytes = terms * TileB::kBytes;
    params.out_offset = kRing * params.stage_bytes;
    params.h_offset = params.out_offset + kRing * TileOut::kBytes;
    params.list_offset = params.h_offset + groups * TileH::kBytes;
    return params.list_offset + kM * static_cast<int>(sizeof(int));
  }
  static constexpr int most_bytes() {
    GroupedAdd<Bf16> params{};
    return divide(params, 2, 256 / kRank);
  }
};
static_assert(AddShape<64, BLayout::kRows>::most_bytes() <= kLeastSharedBytes);

template <class T>
LORA_EXT_DEVICE float bias_at(const GroupedSlot<T>& slot, int64_t column) {
  return slot.in_float ? static_cast<const float*>(slot.lora_bias)[column]
                       : to_float(static_cast<const T*>(slot.lora_bias)[column]);
}

template <class T, int kRank, BLayout kLayout>
__global__ void __launch_bounds__(128, kLeastBlocks)
    grouped_add_sm80_kernel(const __grid_constant__ GroupedAdd<T> params) {
  using Shape = AddShape<kRank, kLayout>;
  using TileH = typename Shape::TileH;
  using TileB = typename Shape::TileB;
  using TileOut = typename Shape::TileOut;
  constexpr bool kDrops = kLayout == BLayout::kRows;
  LORA_EXT_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  const GroupedWork work = params.work[blockIdx.x];
  const GroupedSlot<T>& slot = params.slots[work.slot];
  const int* const list = list_rows(shared + params.list_offset, params.order + work.begin,
                                    work.rows, thread, Shape::kThreads);
  const int groups = slot.r > kRank ? (slot.r + kRank - 1) / kRank : 1;
  const int64_t first_column = int64_t{blockIdx.y} * params.columns_per_block;
  const int64_t left = params.columns - first_column;
  const int columns =
      static_cast<int>(left < params.columns_per_block ? left : params.columns_per_block);
  const int steps = (columns + Shape::kN - 1) / Shape::kN * groups;
  const Matrix<T> out{params.out, work.rows, params.columns, params.columns};
  const Split<T>& b = kLayout == BLayout::kColumns ? slot.B : slot.A;
  const int terms = b.remainder ? 2 : 1;
  const auto out_tile = [&](int column_tile) {
    return shared + params.out_offset + column_tile % Shape::kRing * TileOut::kBytes;
  };
  const auto h_tile = [&](int group) {
    return arch::shared_address(shared + params.h_offset + group * TileH::kBytes);
  };

  // A step has a tile of columns and a group of ranks; what a tile is added to comes with its
  // first.
  const auto load = [&](int step) {
    const int column_tile = step / groups, group = step % groups;
    const int64_t n = first_column + column_tile * Shape::kN;
    const uint32_t stage = arch::shared_address(shared + step % Shape::kRing * params.stage_bytes);
    if constexpr (kLayout == BLayout::kColumns) {
      load_split<TileB, Shape::kThreads>(stage, b, n, group * kRank, thread);
    } else {
      load_split<TileB, Shape::kThreads>(stage, b, group * kRank, n, thread);
    }
    if (group == 0) {
      TileOut::template gather<Shape::kThreads>(arch::shared_address(out_tile(column_tile)), out,
                                                list, work.rows, n, thread);
    }
  };
  const Matrix<T> h{params.operand + slot.operand_at(work.begin, 0), work.rows, slot.padded,
                    slot.padded};
  for (int group = 0; group < groups; ++group) {
    TileH::template load<Shape::kThreads>(h_tile(group), h, 0, group * kRank, thread);
  }
#pragma unroll
  for (int s = 0; s < Shape::kRing - 1; ++s) {
    if (s < steps) load(s);
    arch::cp_async_commit();
  }

  const int own_row = warp * 16 + lane / 4;  // and eight further
  WarpSums<DownShape<Shape::kN>> sums;
  OperandMask mask;
  for (int step = 0; step < steps; ++step) {
    const int column_tile = step / groups, group = step % groups;
    arch::cp_async_wait<Shape::kRing - 2>();
    __syncthreads();  // the stage has arrived; everyone is done with the one before
    if (step + Shape::kRing - 1 < steps) load(step + Shape::kRing - 1);
    arch::cp_async_commit();
    if (warp * 16 >= work.rows) continue;
    if (group == 0) sums.clear();
    const uint32_t stage = arch::shared_address(shared + step % Shape::kRing * params.stage_bytes);
#pragma unroll
    for (int k = 0; k < kRank; k += 16) {
      if (group * kRank + k >= slot.r) break;
      arch::FragmentA a;
      load_a<TileH>(a, h_tile(group), warp * 16, k, lane);
#pragma unroll 1
      for (int term = 0; term < terms; ++term) {
        const uint32_t b_tile = stage + term * TileB::kBytes;
#pragma unroll
        for (int j = 0; j < Shape::kN / 16; ++j) {
          arch::FragmentB pair[2];
          if constexpr (kLayout == BLayout::kColumns) {
            load_b<TileB>(pair, b_tile, k, j * 16, lane);
          } else {
            load_b_rows<TileB>(pair, b_tile, k, j * 16, lane);
          }
          arch::mma_m16n8k16<T>(sums.value[0][2 * j], a, pair[0]);
          arch::mma_m16n8k16<T>(sums.value[0][2 * j + 1], a, pair[1]);
        }
      }
    }
    if (group < groups - 1) continue;

    // Of the last group: dropout or lora_bias, then into the tile, whose rows are the warp's own.
    const int64_t n = first_column + column_tile * Shape::kN;
    if constexpr (kDrops) {
      if (slot.dropout.enabled) {
        if (column_tile % 2 == 0) {
          mask.draw(slot.dropout.rng(), slot.dropout.threshold, {list[own_row], list[own_row + 8]},
                    n / kDropoutBlock, lane);
        }
        mask.apply(sums.value[0], column_tile % 2 * (Shape::kN / kDropoutLanes));
      }
    } else if (slot.lora_bias) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = own_row + e / 2 * 8;
        if (row >= work.rows) continue;
        const float strength = slot.strength(params.factor, work.begin + row);
#pragma unroll
        for (int j = 0; j < Shape::kN / 8; ++j) {
          const int64_t column = n + j * 8 + lane % 4 * 2 + e % 2;
          if (column < params.columns) sums.value[0][j][e] += strength * bias_at(slot, column);
        }
      }
    }
    uint8_t* const tile = out_tile(column_tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < Shape::kN / 8; ++j) {
        auto* const pair = reinterpret_cast<uint32_t*>(
            tile + TileOut::offset(own_row + half * 8, j) + lane % 4 * 4);
        *pair = pack_pair<T>(first_of<T>(*pair) + sums.value[0][j][half * 2],
                             second_of<T>(*pair) + sums.value[0][j][half * 2 + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + i * 4 + lane / 8, chunk = lane % 8;
      if (row >= work.rows || n + chunk * 8 >= params.columns) continue;
      const auto* const from =
          reinterpret_cast<const arch::Words*>(tile + TileOut::offset(row, chunk));
      arch::store_16(params.out + list[row] * params.columns + n + chunk * 8, *from);
    }
  }
}

}  // namespace lora_ext::sm80
