// lora_linear_grouped on the CPU, cut into tasks: ranges of rows of one slot. Each is what a part
// of lora_linear is, by the same kernels. How rows are cut depends on their own slot alone, so that
// what others do changes no bit of it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/backend.h"
#include "cpu/lora_linear.h"
#include "ops/lora_linear_grouped.h"

namespace lora_ext {

constexpr int64_t kUnpackedRows = 2;   // of a slot: so many read its adapter as it lies in forward
constexpr int64_t kGatheredRows = 96;  // copied at a time, where a slot's rows are not neighbours

// f(task, worker) for tasks [begin, end), by whichever thread is free.
template <class F>
void parallel_tasks(int64_t begin, int64_t end, const F& f) {
  std::atomic<int64_t> next{begin};
  at::parallel_for(0, std::min<int64_t>(end - begin, at::get_num_threads()), 1,
                   [&](int64_t worker, int64_t) {
                     for (int64_t task = next++; task < end; task = next++) f(task, worker);
                   });
}

// f(slot) for each slot: one after another where f has threads of its own to pay for.
template <class F>
void for_slots(int64_t slots, const F& f) {
  if (slots < at::get_num_threads()) {
    for (int64_t slot = 0; slot < slots; ++slot) f(slot);
  } else {
    parallel_tasks(0, slots, [&](int64_t slot, int64_t) { f(slot); });
  }
}

inline void check_row(int32_t row, int64_t M) {
  TORCH_CHECK_INDEX(row >= 0 && row < M, "lora_linear_grouped: order: got row ", row,
                    ", expected 0 to ", M - 1, ", the rows of the input");
}

struct CpuSlot : Slot {
  CpuPath::Kernels path;
  const LoraLinearKernels* kernels;  // null: by BLAS calls
  Tensor A_t, B_t;                   // packed, where they are wanted
};

struct Task {
  size_t slot;
  int64_t index;       // among those of the slot
  int64_t begin, end;  // of `order`
  int64_t round;       // how many slots with kernels its rows are in before: not that of the call,
                       // in which slots count whose updates BLAS adds after all these
};

// A call cut into tasks.
struct GroupedWork {
  int64_t M, N, K;
  at::ScalarType base, compute;
  std::vector<CpuSlot> slots;
  std::vector<Task> tasks;  // of the slots that have kernels, by rounds
  std::vector<int64_t> tasks_of;
  const int32_t* order;
  Tensor factors;               // [R] double, or undefined
  std::vector<int32_t> rounds;  // of each row: how many slots with kernels it is in

  GroupedWork(const GroupedAdapters& adapters, int64_t rows, int64_t out_features,
              at::ScalarType dtype)
      : M(rows),
        N(out_features),
        K(adapters.lora_A[0].size(1)),
        base(dtype),
        compute(at::toOpMathType(dtype)),
        order(adapters.order.const_data_ptr<int32_t>()),
        rounds(rows, 0) {
    if (adapters.factor.has_value()) factors = adapters.factor->to(at::kDouble).contiguous();
    check_rows(adapters);
    const Tensor like = at::empty({0}, at::TensorOptions().dtype(base));
    slots.reserve(adapters.slots());
    for (Slot& slot : slots_of(adapters)) {
      if (slot.lora_bias.defined()) slot.lora_bias = slot.lora_bias.to(compute);
      slots.push_back({std::move(slot), {}, {}, {}, {}});
      choose_kernels(slots.back(), like);
      tasks_of.push_back(slots.back().kernels ? cut(slots.size() - 1) : 0);
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.round < b.round; });
  }

  // f(task, worker) for every task, by whichever thread is free; those of a round together, as no
  // row is in two of them.
  template <class F>
  void for_tasks(const F& f) const {
    const auto count = static_cast<int64_t>(tasks.size());
    for (int64_t begin = 0; begin < count;) {
      int64_t end = begin + 1;
      while (end < count && tasks[end].round == tasks[begin].round) ++end;
      parallel_tasks(begin, end, [&](int64_t t, int64_t worker) { f(tasks[t], worker); });
      begin = end;
    }
  }

  const double* factor(int64_t position) const {
    return factors.defined() ? factors.const_data_ptr<double>() + position : nullptr;
  }
  bool are_neighbours(const Task& task) const {
    for (int64_t i = task.begin + 1; i < task.end; ++i) {
      if (order[i] != order[i - 1] + 1) return false;
    }
    return true;
  }
  int64_t scratch_bytes() const {
    int64_t bytes = 0;
    for (const CpuSlot& slot : slots) {
      if (!slot.kernels) continue;
      bytes = std::max({bytes, slot.kernels->scratch_bytes(K, slot.rank()),
                        slot.kernels->single_rows_bytes(K, slot.rank())});
    }
    return bytes;
  }
  int64_t workers() const {
    return std::max<int64_t>(1, std::min<int64_t>(tasks.size(), at::get_num_threads()));
  }

 private:
  void choose_kernels(CpuSlot& slot, const Tensor& like) const {
    const CpuSlot* before = slots.size() > 1 ? &slot - 1 : nullptr;
    const auto facts = [](const CpuSlot& one) {
      return std::tuple(one.rank(), one.dtype(), one.dropout.enabled(), one.rows <= kUnpackedRows);
    };
    if (before && facts(*before) == facts(slot)) {  // mostly: then the same
      slot.path = before->path, slot.kernels = before->kernels;
      return;
    }
    CpuPath path = path_for(M, N, slot.lora_A, base, slot.dropout.enabled(), /*grouped=*/true);
    if (slot.rows <= kUnpackedRows && path.kernels == CpuPath::Kernels::Blas) {
      path.kernels = CpuPath::Kernels::Vector;  // calls of BLAS cost more than such rows
    }
    const bool blas = path.kernels == CpuPath::Kernels::Blas;
    slot.path = path.kernels;
    slot.kernels = blas ? nullptr : &kernels_of(path, like, slot.lora_A);
  }
  void check_rows(const GroupedAdapters& adapters) const {
    const std::vector<SlotRound> parts = rounds_of(adapters);
    std::vector<int32_t> last(M, -1);  // of them, that has a row
    for (size_t p = 0; p < parts.size(); ++p) {
      for (int64_t i = parts[p].begin; i < parts[p].begin + parts[p].rows; ++i) {
        check_row(order[i], M);
        int32_t& before = last[order[i]];
        if (before >= 0) check_again(order[i], parts[before], parts[p], adapters.rounds.empty());
        before = static_cast<int32_t>(p);
      }
    }
  }
  static void check_again(int32_t row, const SlotRound& before, const SlotRound& now, bool one) {
    const char* op = "lora_linear_grouped: order: got row ";
    TORCH_CHECK_VALUE(before.slot != now.slot, op, row, " twice in one slot, expected it once");
    TORCH_CHECK_VALUE(!one, op, row, " twice, expected one slot for each row, or rounds");
    TORCH_CHECK_VALUE(before.round < now.round, op, row, " in round ", now.round, " of slot ",
                      now.slot, ", expected one after ", before.round, ", in which slot ",
                      before.slot, " has it");
  }

  // Into tasks for all threads; not so small that they do not pay for sums of their own.
  int64_t cut(size_t index) {
    constexpr int64_t kMinRows = 32, kMaxRows = 1024, kTasksPerThread = 4;
    constexpr int64_t kMaxPartialSumBytes = int64_t{256} << 20;
    const CpuSlot& slot = slots[index];
    const int64_t threads = at::get_num_threads();
    const int64_t sum_bytes =
        std::max<int64_t>(1, (N + K) * slot.rank() * c10::elementSize(compute));
    const int64_t most = std::max<int64_t>(1, kMaxPartialSumBytes / sum_bytes);
    const int64_t share = at::divup(M, kTasksPerThread * threads);
    const int64_t size =
        std::max(std::min(std::max(share, kMinRows), kMaxRows), at::divup(slot.rows, most));
    int64_t made = 0;
    const int64_t slot_end = slot.begin + slot.rows;
    for (int64_t begin = slot.begin; begin < slot_end;) {  // rows of one round
      const int32_t round = rounds[order[begin]];
      int64_t end = begin;
      while (end < slot_end && rounds[order[end]] == round) ++end;
      const int64_t rows = end - begin, count = at::divup(rows, size);
      const int64_t even = at::divup(rows, count);
      for (int64_t i = 0; i < count; ++i) {
        tasks.push_back({index, made++, begin + std::min(rows, i * even),
                         begin + std::min(rows, (i + 1) * even), round});
      }
      begin = end;
    }
    for (int64_t i = slot.begin; i < slot_end; ++i) ++rounds[order[i]];
    return made;
  }
};

inline char* at_element(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * tensor.element_size();
}

// Rows of a matrix of which a task reads or writes some: where they lie, or a copy in scratch.
struct TaskRows {
  Tensor matrix;  // [M, columns], neighbouring columns adjacent; or undefined
  Tensor copy;    // [workers, kGatheredRows, columns]; or undefined

  TaskRows(const Tensor& of, bool gathers, int64_t workers) : matrix(of) {
    if (matrix.defined() && gathers) {
      copy = at::empty({workers, kGatheredRows, matrix.size(1)}, matrix.options());
    }
  }
  int64_t row_bytes() const { return matrix.size(1) * matrix.element_size(); }
  char* row(int64_t m) const { return at_element(matrix, m * matrix.stride(0)); }
  char* copied(int64_t worker) const { return at_element(copy, worker * copy.stride(0)); }

  void gather(const int32_t* rows, int64_t count, int64_t worker) const {
    if (!matrix.defined()) return;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(copied(worker) + i * row_bytes(), row(rows[i]), row_bytes());
    }
  }
  void scatter(const int32_t* rows, int64_t count, int64_t worker) const {
    if (!matrix.defined()) return;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(row(rows[i]), copied(worker) + i * row_bytes(), row_bytes());
    }
  }
  char* begin(bool gathered, int64_t m, int64_t worker) const {
    return !matrix.defined() ? nullptr : gathered ? copied(worker) : row(m);
  }
  int64_t stride(bool gathered) const {
    return !matrix.defined() ? 0 : gathered ? matrix.size(1) : matrix.stride(0);
  }
};

// f(begin, end, gathered) for the pieces of a task that one call of a kernel can do: of neighbours
// or of rows that are copied together, and, where `one_factor`, of one factor.
template <class F>
void for_pieces(const GroupedWork& work, const Task& task, bool one_factor, const F& f) {
  const bool gathered = !work.are_neighbours(task);
  const double* factors = one_factor ? work.factor(0) : nullptr;
  for (int64_t begin = task.begin; begin < task.end;) {
    int64_t end = gathered ? std::min(task.end, begin + kGatheredRows) : task.end;
    if (factors) {
      int64_t same = begin + 1;
      while (same < end && factors[same] == factors[begin]) ++same;
      end = same;
    }
    f(begin, end, gathered);
    begin = end;
  }
}

inline bool any_gathers(const GroupedWork& work) {
  return std::any_of(work.tasks.begin(), work.tasks.end(),
                     [&](const Task& task) { return !work.are_neighbours(task); });
}

}  // namespace lora_ext
