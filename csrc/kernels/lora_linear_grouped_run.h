// Forward and backward where rows have adapters of their own (lora_linear_grouped.h): one launch of
// each pass for all slots, but one for each round of what adds to y and dx. Host code without
// torch.
#pragma once

#include "grouped_add_sm80.h"
#include "grouped_table.h"
#include "rank_groups.h"

namespace lora_ext {

// As operands of the passes that read it.
template <class T>
struct GroupedOperand {
  T* value;
  T* remainder;  // or null

  GroupedOperand(int64_t elements, bool wants_remainder, const Allocator& scratch)
      : value(scratch.get<T>(elements)),
        remainder(wants_remainder ? scratch.get<T>(elements) : nullptr) {}
};

// The launches of a call, whose table is on the device.
template <class T>
struct GroupedLaunches {
  const GroupedPlan<T>& plan;
  const GroupedTable& table;
  const GroupedRows& rows;
  int64_t slots;  // places in the table
  const GroupedTiles& tiles;
  Stream stream;

  sm80::GroupedPass<T> pass(const WorkList& list, const Matrix<T>& matrix) const {
    sm80::GroupedPass<T> params{};
    params.slots = table.at<GroupedSlot<T>>(slots);
    params.work = table.at<GroupedWork>(list.place);
    params.order = rows.order, params.rows = matrix;
    return params;
  }
  GroupedFinish<T> finish(const GroupedOperand<T>& out) const {
    GroupedFinish<T> params{};
    params.slots = table.at<GroupedSlot<T>>(slots);
    params.work = table.at<GroupedWork>(tiles.list.place);
    params.factor = rows.factor;
    params.part = plan.operand;
    params.value = out.value, params.remainder = out.remainder;
    return params;
  }
  void launch(const GroupedFinish<T>& params) const {
    arch::launch_dependent(grouped_finish_kernel<T>, flat_grid(tiles.count()), kElementThreads, 0,
                           stream, params);
  }

  // h of x, in parts along K; then as the operand that `out` describes.
  void down(const Matrix<T>& x, GroupedFinish<T> out) const {
    sm80::GroupedPass<T> params = pass(tiles.list, x);
    params.splits = grouped_splits(x.rows, x.columns);
    params.part = plan.operand;
    params.parts = plan.scratch.template get<float>(params.splits * plan.operand);
    with_width<64>(tiles.list.most_ranks, [&](auto width) {
      constexpr int kColumns = decltype(width)::value;
      using Shape = sm80::DownShape<kColumns>;
      params.list_offset = Shape::kSharedBytes;
      constexpr int kShared = Shape::kSharedBytes + 64 * int{sizeof(int)};
      static_assert(kShared <= sm80::kLeastSharedBytes);
      const dim3 grid(tiles.list.blocks(), static_cast<unsigned>(params.splits));
      arch::launch_dependent(sm80::grouped_down_sm80_kernel<T, kColumns>, grid, 128, kShared,
                             stream, params);
    });
    out.parts = params.parts, out.count = params.splits, out.dropped = true;
    launch(out);
  }

  // out[rows] += operand b, b being lora_B of forward or lora_A of backward: a launch for each
  // round, so that no two blocks add to the same row at once, and the order is always the same.
  template <BLayout kLayout>
  void add(const T* operand, T* out, int64_t columns) const {
    bool remainders = false;
    int most_rank = 0;
    for (size_t s = 0; s < plan.slots.size(); ++s) {
      if (!plan.is_there(s)) continue;
      const GroupedSlot<T>& slot = plan.slots[s];
      remainders |= (kLayout == BLayout::kColumns ? slot.B : slot.A).remainder != nullptr;
      most_rank = static_cast<int>(larger(most_rank, slot.r));
    }
    const int64_t wanted = sm80::wanted_blocks(), most = ceil_div(columns, kDropoutBlock);
    sm80::GroupedAdd<T> params{};
    params.slots = table.at<GroupedSlot<T>>(slots);
    params.order = rows.order, params.factor = rows.factor;
    params.operand = operand, params.out = out, params.columns = columns;
    with_width<64>(most_rank, [&](auto width) {
      constexpr int kRank = decltype(width)::value;
      const auto groups = static_cast<int>(larger(1, ceil_div(most_rank, kRank)));
      const int shared = sm80::AddShape<kRank, kLayout>::divide(params, remainders ? 2 : 1, groups);
      for (size_t i = 1; i < tiles.rounds.size(); ++i) {
        const unsigned begin = tiles.rounds[i - 1], count = tiles.rounds[i] - begin;
        const int64_t blocks = larger(1, smaller(most, ceil_div(wanted, count)));
        const int64_t own = round_up(ceil_div(columns, blocks), kDropoutBlock);
        params.work = table.at<GroupedWork>(tiles.list.place) + begin;
        params.columns_per_block = static_cast<int>(smaller(own, 1024));
        const dim3 grid(count, static_cast<unsigned>(ceil_div(columns, params.columns_per_block)));
        arch::launch_dependent(sm80::grouped_add_sm80_kernel<T, kRank, kLayout>, grid, 128, shared,
                               stream, params);
      }
    });
  }

  void up_grad(sm80::GroupedPass<T> params, const WorkList& list) const {
    with_width<64>(list.most_ranks, [&](auto width) {
      constexpr int kRank = decltype(width)::value;
      params.list_offset = sm80::UpGradShape<kRank>::shared_bytes(params.columns);
      const int64_t shared = params.list_offset + round_up(list.most_rows, 64) * sizeof(int);
      const dim3 grid(list.blocks(),
                      static_cast<unsigned>(ceil_div(params.rows.columns, params.columns)));
      arch::launch_dependent(sm80::grouped_up_grad_sm80_kernel<T, kRank>, grid, 128,
                             static_cast<int>(shared), stream, params);
    });
  }
  void down_grad(sm80::GroupedPass<T> params, const WorkList& list) const {
    with_width<64>(list.most_ranks, [&](auto width) {
      constexpr int kRank = decltype(width)::value;
      using Shape = sm80::DownGradShape<kRank>;
      params.list_offset = Shape::kSharedBytes;
      constexpr int kMost = Shape::kSharedBytes + sm80::kMostListed * int{sizeof(int)};
      static_assert(kMost <= sm80::kLeastSharedBytes);
      const int64_t shared = params.list_offset + round_up(list.most_rows, 64) * sizeof(int);
      const dim3 grid(list.blocks(),
                      static_cast<unsigned>(ceil_div(params.rows.columns, Shape::kK)));
      arch::launch_dependent(sm80::grouped_down_grad_sm80_kernel<T, kRank>, grid, 128,
                             static_cast<int>(shared), stream, params);
    });
  }
};

template <class T>
void run_grouped_forward(const GroupedForwardCall<T>& call, const Allocator& scratch,
                         Stream stream) {
  const int64_t K = call.x.columns;
  GroupedPlan<T> plan(call.rows, false, scratch);
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    if (!plan.is_there(s)) continue;
    const GroupedAdapter& one = call.rows.adapters[s];
    plan.slots[s].A = plan.split(one.lora_A, one.in_float, one.r, K, K);
    plan.slots[s].B = plan.split(one.lora_B, one.in_float, call.N, one.r, one.r);
  }
  GroupedTiles tiles = plan.tiles();
  if (tiles.count() == 0) return;
  GroupedTable table;
  const int64_t slots = table.add(plan.slots);
  tiles.list.put(table), plan.packs.put(table);
  table.write(scratch, stream);

  plan.packs.launch(grouped_pack_kernel<T>, table, stream);
  const GroupedLaunches<T> launches{plan, table, call.rows, slots, tiles, stream};
  const GroupedOperand<T> h(plan.operand, false, scratch);
  GroupedFinish<T> of_h = launches.finish(h);
  of_h.scaled = true, of_h.sums = call.h;
  launches.down(call.x, of_h);
  launches.template add<BLayout::kColumns>(h.value, call.y, call.N);
}

// Pieces of up to `rows` rows of the slots that `wants` names, in groups of up to kMost of `ranks`
// ranks; of several pieces each has a part of the gradient, which `left` adds up, and of slots
// without rows it is 0.
template <class T, class Wants, class Ranks, class Job>
WorkList gradient_work(const GroupedPlan<T>& plan, int64_t rows, int64_t most, const Wants& wants,
                       const Ranks& ranks, const Job& job_of,
                       TableJobList<GroupedReduceJob<T>>& left) {
  WorkList list;
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    const GroupedSlot<T>& slot = plan.slots[s];
    const int64_t pieces = ceil_div(plan.rows[s], rows);
    GroupedReduceJob<T> job = job_of(slot);
    const bool stores = is_wanted(job.out) || is_wanted(job.dlora_bias);
    float* parts = nullptr;
    if (stores && pieces > 1) parts = plan.scratch.template get<float>(pieces * job.size);
    job.parts = parts, job.count = parts ? pieces : 0;
    if (stores && pieces != 1) left.add(job, job.size);
    if (!wants(slot)) continue;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = piece * rows;
      for (int64_t first = 0; first < ranks(slot); first += most) {
        list.add({static_cast<int>(s), slot.begin + static_cast<int>(begin),
                  static_cast<int>(smaller(rows, plan.rows[s] - begin)), static_cast<int>(first),
                  static_cast<int>(smaller(most, ranks(slot) - first)),
                  parts ? parts + piece * job.size : nullptr});
      }
    }
  }
  return list;
}

template <class T>
Gradient<T> grouped_gradient(void* out, bool in_float, float scale) {
  return {{scale, nullptr},
          in_float ? nullptr : static_cast<T*>(out),
          in_float ? static_cast<float*>(out) : nullptr};
}

template <class T>
void run_grouped_backward(const GroupedBackwardCall<T>& call, const Allocator& scratch,
                          Stream stream) {
  const int64_t M = call.dy.rows, N = call.dy.columns, K = call.K;
  GroupedPlan<T> plan(call.rows, true, scratch);
  bool any_dA = false, any_dB = false, any_h = false;
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    const GroupedAdapter& one = call.rows.adapters[s];
    GroupedSlot<T>& slot = plan.slots[s];
    const bool in_float = one.in_float;
    slot.dA = grouped_gradient<T>(one.dA, in_float, 1.0f);
    slot.dB = grouped_gradient<T>(one.dB, in_float, one.scaling);
    slot.dlora_bias = grouped_gradient<T>(one.dlora_bias, in_float, one.scaling);
    slot.wants_dh = call.dx || call.dfactor || one.dA;
    if (!plan.is_there(s)) continue;
    any_dA |= one.dA != nullptr, any_dB |= one.dB != nullptr;
    any_h |= one.dB || one.dlora_bias;
  }
  const bool makes_h = any_dB && !call.h;
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    if (!plan.is_there(s)) continue;
    const GroupedAdapter& one = call.rows.adapters[s];
    GroupedSlot<T>& slot = plan.slots[s];
    if (call.dx || makes_h) slot.A = plan.split(one.lora_A, one.in_float, one.r, K, K);
    slot.B = one.lora_bias
                 ? plan.split_with_column(one.lora_B, one.lora_bias, one.in_float, N, one.r)
                 : plan.split(one.lora_B, one.in_float, N, one.r, one.r);
  }

  // The passes over dy and over x, and what each leaves to be added.
  const int64_t columns = smaller(round_up(N, 64), sm80::kMostUpGradColumns);
  const int64_t column_blocks = ceil_div(N, columns);
  const int64_t list_bytes = sm80::kMostListed * int64_t{sizeof(int)};
  const bool fits = sm80::UpGradShape<64>::shared_bytes(static_cast<int>(columns)) + list_bytes <=
                    arch::most_shared_bytes();
  static_assert(sm80::UpGradShape<32>::shared_bytes(sm80::kMostUpGradColumns) +
                    sm80::kMostListed * int{sizeof(int)} <=
                sm80::kLeastSharedBytes);
  TableJobList<GroupedReduceJob<T>> left;
  WorkList up = gradient_work(
      plan, grouped_rows(M, column_blocks), fits ? 64 : 32,
      [](const GroupedSlot<T>& slot) {
        return slot.wants_dh || is_wanted(slot.dB) || is_wanted(slot.dlora_bias);
      },
      [](const GroupedSlot<T>& slot) { return slot.width; },
      [N](const GroupedSlot<T>& slot) {
        return GroupedReduceJob<T>{nullptr, 0,       N * slot.width, slot.width,
                                   slot.r,  slot.dB, slot.dlora_bias};
      },
      left);
  WorkList down = gradient_work(
      plan, grouped_rows(M, ceil_div(K, sm80::DownGradShape<16>::kK)), 64,
      [](const GroupedSlot<T>& slot) { return is_wanted(slot.dA); },
      [](const GroupedSlot<T>& slot) { return slot.r; },
      [K](const GroupedSlot<T>& slot) {
        const int width = static_cast<int>(K);
        return GroupedReduceJob<T>{nullptr, 0, slot.r * K, width, width, slot.dA, {}};
      },
      left);
  GroupedTiles tiles = plan.tiles();
  GroupedTable table;
  const int64_t slots = table.add(plan.slots);
  tiles.list.put(table), up.put(table), down.put(table);
  plan.packs.put(table), left.put(table);
  table.write(scratch, stream);

  const GroupedLaunches<T> launches{plan, table, call.rows, slots, tiles, stream};
  if (tiles.count() > 0) {
    plan.packs.launch(grouped_pack_kernel<T>, table, stream);
    sm80::GroupedPass<T> over_dy = launches.pass(up, call.dy);
    if (any_h) {
      const GroupedOperand<T> h(plan.operand, true, scratch);
      GroupedFinish<T> of_h = launches.finish(h);
      of_h.given = call.h;
      if (makes_h) {
        launches.down(call.x, of_h);
      } else {
        launches.launch(of_h);
      }
      over_dy.value = h.value, over_dy.remainder = h.remainder;
    }
    if (up.blocks() > 0) {
      over_dy.columns = static_cast<int>(columns), over_dy.part = plan.operand;
      over_dy.parts = scratch.get<float>(column_blocks * plan.operand);
      launches.up_grad(over_dy, up);
    }
    if (call.dx || call.dfactor || any_dA) {
      const GroupedOperand<T> dh(plan.operand, any_dA, scratch);
      GroupedFinish<T> of_dh = launches.finish(dh);
      of_dh.parts = over_dy.parts, of_dh.count = static_cast<int>(column_blocks);
      of_dh.dropped = of_dh.scaled = true;
      of_dh.h = call.h, of_dh.dfactor = call.dfactor;
      launches.launch(of_dh);
      if (down.blocks() > 0) {
        sm80::GroupedPass<T> over_x = launches.pass(down, call.x);
        over_x.value = dh.value, over_x.remainder = dh.remainder;
        launches.down_grad(over_x, down);
      }
      if (call.dx) launches.template add<BLayout::kRows>(dh.value, call.dx, K);
    }
  }
  left.launch(grouped_reduce_kernel<T>, table, stream);
}

}  // namespace lora_ext
