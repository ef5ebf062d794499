// The table of a call of lora_linear_grouped: slots, what each block of the passes has, and the
// jobs of the small kernels, in one buffer that is written to the device once. Host code.
//
// How a slot is cut into blocks and parts follows from its own rows and from the sizes of the call:
// not from the other slots, nor from the GPU. So an adapter's results are the same bit for bit,
// whatever the rows of others have.
#pragma once

#include <algorithm>
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

// Tiles of up to 64 rows of a slot, all in one round: first one entry for each, then the ranks
// beyond the first group.
struct GroupedTiles {
  WorkList list;
  std::vector<unsigned> rounds{0};  // where each begins among the first, and where the last ends

  unsigned count() const { return rounds.back(); }
};

template <class T>
struct GroupedPlan {
  // Rows of a slot that are in one round.
  struct Part {
    size_t slot;
    int64_t round;
    int begin, rows;
  };

  std::vector<GroupedSlot<T>> slots;
  std::vector<int> rows;    // of each
  std::vector<Part> parts;  // of those that have anything to be added, by rounds
  int64_t operand = 0;      // elements of an operand, or of a part of h or dh
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
    if (call.rounds.empty()) {
      for (size_t s = 0; s < slots.size(); ++s) add_part({s, 0, slots[s].begin, rows[s]});
    } else {
      begin = 0;
      for (const GroupedRound& one : call.rounds) {
        add_part({static_cast<size_t>(one.adapter), one.round, begin, static_cast<int>(one.rows)});
        begin += static_cast<int>(one.rows);
      }
      std::stable_sort(parts.begin(), parts.end(),
                       [](const Part& a, const Part& b) { return a.round < b.round; });
    }
  }

  // Whether the slot's rows have anything to be added.
  bool is_there(size_t s) const { return rows[s] > 0 && (slots[s].r > 0 || slots[s].lora_bias); }

  void add_part(const Part& part) {
    if (is_there(part.slot)) parts.push_back(part);
  }

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

  GroupedTiles tiles() const {
    GroupedTiles made;
    for (int from = 0; from < kMostGroupedRank; from += 64) {
      for (size_t p = 0; p < parts.size(); ++p) {
        const Part& part = parts[p];
        const int r = slots[part.slot].r;
        if (from > 0 && from >= r) continue;
        for (int first = 0; first < part.rows; first += 64) {
          made.list.add({static_cast<int>(part.slot), part.begin + first,
                         static_cast<int>(smaller(64, part.rows - first)), from,
                         static_cast<int>(smaller(64, r - from)), nullptr});
        }
        const bool ends = p + 1 == parts.size() || parts[p + 1].round != part.round;
        if (from == 0 && ends) made.rounds.push_back(made.list.blocks());
      }
    }
    return made;
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
