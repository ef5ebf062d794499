// The table of a call of lora_linear_grouped: slots, what each block of the passes has, and the
// jobs of the small kernels, in one buffer that is written to the device once. Host code.
//
// How a slot is cut into blocks and parts follows from its own rows and from the sizes of the call:
// not from the other slots, nor from the GPU. So an adapter's results are the same bit for bit,
// whatever the rows of others have.
#pragma once

#include <cstddef>
#include <vector>

#include "grouped_elementwise.h"
#include "grouped_passes_sm80.h"
#include "lora_linear_grouped.h"
#include "span.h"
#include "write_table.h"

namespace lora_ext {

constexpr int64_t kGroupedBlocks = 256;  // that sizes of a call are cut for: two of each of many
constexpr int kMostGroupedRank = 256;

class GroupedTable {
 public:
  // Its place in the buffer.
  template <class E>
  int64_t add(const std::vector<E>& entries) {
    const auto place = round_up(static_cast<int64_t>(bytes_.size()), 16);
    bytes_.resize(static_cast<size_t>(place) + entries.size() * sizeof(E));
    if (!entries.empty()) memcpy(bytes_.data() + place, entries.data(), entries.size() * sizeof(E));
    return place;
  }
  void write(const Allocator& scratch, Stream stream) {
    const auto bytes = round_up(static_cast<int64_t>(bytes_.size()), 16);
    bytes_.resize(static_cast<size_t>(bytes));
    auto* const device = scratch.get<std::byte>(bytes);
    write_table(device, bytes_.data(), bytes, stream);
    device_ = device;
  }
  template <class E>
  const E* at(int64_t place) const {
    return reinterpret_cast<const E*>(device_ + place);
  }

 private:
  std::vector<std::byte> bytes_;
  const std::byte* device_ = nullptr;
};

// Jobs of all slots for one kernel.
template <class Job>
class TableJobList {
 public:
  void add(const Job& job, int64_t elements) {
    if (elements == 0) return;
    jobs_.push_back({job, elements, static_cast<unsigned>(blocks_)});
    blocks_ += ceil_div(elements, kElementThreads);
  }
  void put(GroupedTable& table) { place_ = table.add(jobs_); }
  void launch(void (*kernel)(TableJobs<Job>), const GroupedTable& table, Stream stream) const {
    if (jobs_.empty()) return;
    const TableJobs<Job> params{table.at<TableJob<Job>>(place_), static_cast<int>(jobs_.size())};
    arch::launch_dependent(kernel, flat_grid(blocks_), kElementThreads, 0, stream, params);
  }

 private:
  std::vector<TableJob<Job>> jobs_;
  int64_t blocks_ = 0, place_ = 0;
};

// What the blocks of a pass have.
struct WorkList {
  std::vector<GroupedWork> work;
  int most_ranks = 0, most_rows = 0;
  int64_t place = 0;

  void add(const GroupedWork& one) {
    work.push_back(one);
    if (one.ranks > most_ranks) most_ranks = one.ranks;
    if (one.rows > most_rows) most_rows = one.rows;
  }
  void put(GroupedTable& table) { place = table.add(work); }
  unsigned blocks() const { return static_cast<unsigned>(work.size()); }
};

template <class T>
struct GroupedPlan {
  std::vector<GroupedSlot<T>> slots;
  std::vector<int> rows;  // of each
  int64_t operand = 0;    // elements of an operand, or of a part of h or dh
  TableJobList<PackJob<T>> packs;
  const Allocator& scratch;

  GroupedPlan(const GroupedRows& call, bool backward, const Allocator& of) : scratch(of) {
    int begin = 0;
    int64_t hidden = 0;
    for (const GroupedAdapter& one : call.adapters) {
      GroupedSlot<T> slot{};
      slot.in_float = one.in_float;
      slot.lora_bias = one.lora_bias;
      slot.hidden = hidden, slot.operand = operand, slot.begin = begin;
      slot.r = one.r, slot.width = one.r + (backward && one.lora_bias ? 1 : 0);
      slot.padded = static_cast<int>(round_up(slot.width, 16));
      slot.scaling = one.scaling, slot.dropout = one.dropout;
      slot.dropout.enabled = one.dropout.drops();
      slot.survivor = one.dropout.enabled ? one.dropout.scale : 1.0f;
      slots.push_back(slot);
      rows.push_back(static_cast<int>(one.rows));
      begin += static_cast<int>(one.rows);
      hidden += one.rows * one.r;
      operand += one.rows * slot.padded;
    }
  }

  // Whether the slot's rows have anything to be added.
  bool is_there(size_t s) const { return rows[s] > 0 && (slots[s].r > 0 || slots[s].lora_bias); }

  // in [rows, columns] as tensor cores read it, of `width` columns: as it lies where they can.
  Split<T> split(const void* in, bool in_float, int64_t count, int64_t columns, int64_t width) {
    if (columns == width && !in_float && count * columns > 0) {
      const Matrix<T> as_it_is{static_cast<const T*>(in), count, columns, columns};
      if (as_it_is.aligned()) return {as_it_is, nullptr};
    }
    PackJob<T> job{.in = in,
                   .in_float = in_float,
                   .rows = count,
                   .columns = columns,
                   .row_step = columns,
                   .column_step = 1,
                   .padded_rows = count,
                   .padded_columns = columns,
                   .stride = larger(round_up(width, 8), 8),
                   .value = nullptr,
                   .remainder = nullptr};
    job.value = scratch.get<T>(count * job.stride);
    if (in_float) job.remainder = scratch.get<T>(count * job.stride);
    packs.add(job, count * columns);
    return {{job.value, count, width, job.stride}, job.remainder};
  }
  // The same with another column, of one element for each row.
  Split<T> split_with_column(const void* in, const void* column, bool in_float, int64_t count,
                             int64_t columns) {
    const Split<T> both = split(in, in_float, count, columns, columns + 1);
    const auto place = [&](const T* of) { return of ? const_cast<T*>(of) + columns : nullptr; };
    packs.add({.in = column,
               .in_float = in_float,
               .rows = count,
               .columns = 1,
               .row_step = 1,
               .column_step = 1,
               .padded_rows = count,
               .padded_columns = 1,
               .stride = both.value.stride,
               .value = place(both.value.data),
               .remainder = place(both.remainder)},
              count);
    return both;
  }

  // Calls f(slot, first row, rows) for pieces of up to `most` rows of each slot.
  template <class F>
  void for_pieces(int64_t most, const F& f) const {
    for (size_t s = 0; s < slots.size(); ++s) {
      if (!is_there(s)) continue;
      for (int64_t first = 0; first < rows[s]; first += most) {
        f(s, static_cast<int>(first), static_cast<int>(smaller(most, rows[s] - first)));
      }
    }
  }

  // Tiles of 64 rows: first one entry for each, then the ranks beyond the first group.
  WorkList tiles(unsigned* count) const {
    WorkList list;
    const auto add = [&](int64_t group) {
      for_pieces(64, [&](size_t s, int first, int of_piece) {
        const int64_t from = group * 64;
        if (group > 0 && from >= slots[s].r) return;
        list.add({static_cast<int>(s), slots[s].begin + first, of_piece, static_cast<int>(from),
                  static_cast<int>(smaller(64, slots[s].r - from)), nullptr});
      });
    };
    for (int64_t group = 0; group * 64 < kMostGroupedRank; ++group) {
      add(group);
      if (group == 0) *count = list.blocks();
    }
    return list;
  }
};

// Rows of a block whose columns are `column_blocks` beside each other: so that a call of M rows has
// about kGroupedBlocks.
inline int64_t grouped_rows(int64_t M, int64_t column_blocks) {
  const int64_t wanted = larger(1, smaller(ceil_div(M, 64), kGroupedBlocks / column_blocks));
  return smaller(round_up(ceil_div(M, wanted), 64), sm80::kMostListed);
}

// Parts of h along K: blocks of at least four steps.
inline int grouped_splits(int64_t M, int64_t K) {
  const int64_t most = ceil_div(ceil_div(K, 64), 4);
  return static_cast<int>(larger(1, smaller(most, kGroupedBlocks / ceil_div(M, 64))));
}

}  // namespace lora_ext
