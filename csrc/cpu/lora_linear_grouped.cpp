// lora_linear_grouped on the CPU. Tasks are ranges of rows of one slot: each is what a part of
// lora_linear is, by the same kernels. How rows are cut depends on their own slot alone, so that
// what others do changes no bit of it.
#include "ops/lora_linear_grouped.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "cpu/backend.h"
#include "cpu/lora_linear.h"
#include "ops/lora_linear_grouped_composed.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

constexpr int64_t kGatheredRows = 96;  // copied at a time, where a slot's rows are not neighbours

// f(task, worker) for each task, by whichever thread is free.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1,
                   [&](int64_t worker, int64_t) {
                     for (int64_t task = next++; task < tasks; task = next++) f(task, worker);
                   });
}

// f(slot) for each slot: one after another where f has threads of its own to pay for.
template <class F>
void for_slots(int64_t slots, const F& f) {
  if (slots < at::get_num_threads()) {
    for (int64_t slot = 0; slot < slots; ++slot) f(slot);
  } else {
    parallel_tasks(slots, [&](int64_t slot, int64_t) { f(slot); });
  }
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
};

// A call cut into tasks.
struct GroupedWork {
  int64_t M, N, K;
  at::ScalarType base, compute;
  std::vector<CpuSlot> slots;
  std::vector<Task> tasks;  // of the slots that have kernels
  std::vector<int64_t> tasks_of;
  const int32_t* order;
  Tensor factors;              // [R] double, or undefined
  std::vector<bool> has_slot;  // of each row

  GroupedWork(const GroupedAdapters& adapters, int64_t rows, int64_t out_features,
              at::ScalarType dtype)
      : M(rows),
        N(out_features),
        K(adapters.lora_A[0].size(1)),
        base(dtype),
        compute(at::toOpMathType(dtype)),
        order(adapters.order.const_data_ptr<int32_t>()),
        has_slot(rows, false) {
    check_order(adapters.order.numel());
    if (adapters.factor.has_value()) factors = adapters.factor->to(at::kDouble).contiguous();
    for (Slot& slot : slots_of(adapters)) {
      const CpuPath path = path_for(M, N, slot.lora_A, base, slot.dropout.enabled());
      if (slot.lora_bias.defined()) slot.lora_bias = slot.lora_bias.to(compute);
      const bool blas = path.kernels == CpuPath::Kernels::Blas;
      const Tensor like = at::empty({0}, at::TensorOptions().dtype(base));
      const auto* kernels = blas ? nullptr : &kernels_of(path, like, slot.lora_A);
      slots.push_back({std::move(slot), path.kernels, kernels, {}, {}});
      tasks_of.push_back(blas ? 0 : cut(slots.size() - 1));
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
      if (slot.kernels) bytes = std::max(bytes, slot.kernels->scratch_bytes(K, slot.rank()));
    }
    return bytes;
  }
  int64_t workers() const {
    return std::max<int64_t>(1, std::min<int64_t>(tasks.size(), at::get_num_threads()));
  }

 private:
  void check_order(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK_INDEX(order[i] >= 0 && order[i] < M, "lora_linear_grouped: order: got row ",
                        order[i], ", expected 0 to ", M - 1, ", the rows of the input");
      TORCH_CHECK_VALUE(!has_slot[order[i]], "lora_linear_grouped: order: got row ", order[i],
                        " twice, expected one slot for each row");
      has_slot[order[i]] = true;
    }
  }

  // Into tasks for all threads; not so small that they do not pay for sums of their own.
  int64_t cut(size_t index) {
    constexpr int64_t kMinRows = 32, kMaxRows = 1024, kTasksPerThread = 4;
    constexpr int64_t kMaxPartialSumBytes = int64_t{256} << 20;
    const CpuSlot& slot = slots[index];
    if (slot.rows == 0) return 0;
    const int64_t threads = at::get_num_threads();
    const int64_t sum_bytes =
        std::max<int64_t>(1, (N + K) * slot.rank() * c10::elementSize(compute));
    const int64_t most = std::max<int64_t>(1, kMaxPartialSumBytes / sum_bytes);
    const int64_t share = at::divup(M, kTasksPerThread * threads);
    const int64_t size =
        std::max(std::min(std::max(share, kMinRows), kMaxRows), at::divup(slot.rows, most));
    const int64_t count = at::divup(slot.rows, size), even = at::divup(slot.rows, count);
    for (int64_t i = 0; i < count; ++i) {
      tasks.push_back({index, i, slot.begin + std::min(slot.rows, i * even),
                       slot.begin + std::min(slot.rows, (i + 1) * even)});
    }
    return count;
  }
};

char* at_element(const Tensor& tensor, int64_t element) {
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
// or of rows that are copied together, and of one factor.
template <class F>
void for_pieces(const GroupedWork& work, const Task& task, const F& f) {
  const bool gathered = !work.are_neighbours(task);
  const double* factors = work.factor(0);
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

bool any_gathers(const GroupedWork& work) {
  return std::any_of(work.tasks.begin(), work.tasks.end(),
                     [&](const Task& task) { return !work.are_neighbours(task); });
}

void pack_adapters(GroupedWork& work, bool lora_B) {
  for_slots(work.slots.size(), [&](int64_t index) {
    CpuSlot& slot = work.slots[index];
    if (!slot.kernels || slot.rows == 0) return;
    slot.A_t = packed(*slot.kernels, slot.lora_A);
    if (lora_B) slot.B_t = packed(*slot.kernels, slot.lora_B);
  });
}

DropoutArgs dropout_of(const Slot& slot, const int32_t* rows) {
  DropoutArgs args = dropout_args(slot.dropout.p, slot.dropout.rng_state);
  args.rows = rows;
  return args;
}

// bias + scaling * lora_bias [N] in the compute type; undefined if there is neither.
Tensor slot_bias(const Slot& slot, const Tensor& bias, double scaling) {
  if (!slot.lora_bias.defined()) return bias;
  const Tensor scaled = slot.lora_bias * scaling;
  return bias.defined() ? bias + scaled : scaled;
}

// The rows of no slot: of bias, or 0.
void fill_base_rows(const GroupedWork& work, const Tensor& out, const Tensor& bias) {
  const Tensor row = bias.defined() ? bias.to(out.scalar_type()).contiguous() : Tensor();
  const int64_t bytes = out.size(1) * out.element_size();
  at::parallel_for(0, work.M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (work.has_slot[m]) continue;
      char* p = at_element(out, m * out.stride(0));
      if (row.defined()) {
        std::memcpy(p, row.const_data_ptr(), bytes);
      } else {
        std::memset(p, 0, bytes);
      }
    }
  });
}

// BLAS adds the product of a single row to what is there term by term, in memory (see
// lora_linear.cpp): it is made apart.
bool is_single_row(const GroupedWork& work) { return work.M == 1 && work.compute == work.base; }

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_cpu(const LoraLinearGroupedCall& call,
                                                       bool return_h) {
  check_lora_linear_grouped(call);
  const Tensor x = as_rows(call.x), order = call.order.contiguous();
  const int64_t M = x.size(0), N = call.weight.size(0);
  GroupedAdapters adapters{call.lora_A, call.lora_B,  call.lora_bias, order,         call.counts,
                           call.factor, call.scaling, call.dropout_p, call.rng_state};
  GroupedWork work(adapters, M, N, x.scalar_type());
  const Tensor y = at::empty_symint(with_width(call.x, N), x.options());
  const Tensor h =
      at::empty({return_h ? grouped_hidden_size(adapters) : 0}, x.options().dtype(work.compute));
  if (y.numel() == 0) return {y, h.zero_()};
  const Tensor y_rows = y.view({M, N}), bias = as_vector(call.bias, work.compute);

  pack_adapters(work, /*lora_B=*/true);
  fill_base_rows(work, y_rows, bias);
  const int64_t workers = work.workers();
  const bool gathers = any_gathers(work);
  const TaskRows x_of(x, gathers, workers), y_of(y_rows, gathers, workers);
  const Scratch scratch(work.scratch_bytes(), workers);
  parallel_tasks(work.tasks.size(), [&](int64_t t, int64_t worker) {
    const Task& task = work.tasks[t];
    const CpuSlot& slot = work.slots[task.slot];
    for_pieces(work, task, [&](int64_t begin, int64_t end, bool gathered) {
      const int32_t* rows = work.order + begin;
      const double factor = work.factors.defined() ? *work.factor(begin) : 1.0;
      const Tensor total_bias = slot_bias(slot, bias, slot.scaling * factor);
      if (gathered) x_of.gather(rows, end - begin, worker);
      LoraLinearForwardArgs args{};
      args.M = M, args.K = work.K, args.N = N, args.r = slot.rank();
      args.x = x_of.begin(gathered, rows[0], worker), args.ldx = x_of.stride(gathered);
      args.lora_A_t = slot.A_t.const_data_ptr(), args.lora_B_t = slot.B_t.const_data_ptr();
      args.bias = data_or_null(total_bias);
      args.scaling = slot.scaling * factor;
      args.dropout = dropout_of(slot, rows);
      args.y = y_of.begin(gathered, rows[0], worker);
      if (return_h) args.h = at_element(h, slot.h_begin + (begin - slot.begin) * slot.rank());
      slot.kernels->forward_rows(args, 0, end - begin, scratch.part(worker));
      if (gathered) y_of.scatter(rows, end - begin, worker);
    });
  });
  for (const CpuSlot& slot : work.slots) {
    if (!slot.kernels && slot.rows > 0) {
      composed_slot_forward(slot, x, order, call.factor, call.bias, y_rows,
                            return_h ? h : Tensor());
    }
  }

  if (is_single_row(work)) {
    y_rows.add_(at::mm(x, call.weight.t()));
  } else {
    add_base(y_rows, x, call.weight);
  }
  return {y, h};
}

// h times the factor of its rows, where backward reads it.
Tensor scaled_hidden(const GroupedWork& work, const OptionalTensor& h) {
  if (!h.has_value()) return {};
  const Tensor hidden = h->contiguous();
  if (!work.factors.defined()) return hidden;
  const Tensor scaled = hidden.clone();
  for (const Slot& slot : work.slots) {
    if (slot.rows == 0 || slot.rank() == 0) continue;
    scaled.narrow(0, slot.h_begin, slot.rows * slot.rank())
        .view({slot.rows, slot.rank()})
        .mul_(work.factors.narrow(0, slot.begin, slot.rows).unsqueeze(1).to(work.compute));
  }
  return scaled;
}

GroupedResults lora_linear_grouped_bwd_cpu(const LoraLinearGroupedBackwardCall& call,
                                           GroupedMask mask, at::IntArrayRef wanted) {
  check_lora_linear_grouped_bwd(call, mask, wanted);
  const Tensor dy = as_rows(call.dy), x = call.x.has_value() ? as_rows(*call.x) : Tensor();
  const Tensor order = call.order.contiguous();
  GroupedAdapters adapters{call.lora_A, call.lora_B,  call.lora_bias, order,         call.counts,
                           call.factor, call.scaling, call.dropout_p, call.rng_state};
  const int64_t M = dy.size(0), N = dy.size(1);
  GroupedWork work(adapters, M, N, dy.scalar_type());
  const auto n = static_cast<int64_t>(work.slots.size());
  const Tensor dx = gradient_or_empty(mask[kGroupedX], call.dy, with_width(call.dy, work.K));
  const Tensor dx_rows = mask[kGroupedX] ? dx.view({M, work.K}) : Tensor();
  const Tensor dfactor =
      mask[kGroupedFactor] ? at::zeros_like(*call.factor) : at::empty({0}, dy.options());
  const Tensor h = scaled_hidden(work, call.h);

  TensorVector dA, dB, dlora_bias;
  std::vector<PartialSums> sums_A, sums_B;
  bool makes_h = false;
  for (int64_t j = 0; j < n; ++j) {
    const CpuSlot& slot = work.slots[j];
    dA.push_back(gradient_or_empty(wanted[j] & kSlotA, slot.lora_A));
    dB.push_back(gradient_or_empty(wanted[j] & kSlotB, slot.lora_B));
    const bool runs = slot.kernels && slot.rows > 0;
    if (slot.rows == 0) dA[j].zero_(), dB[j].zero_();
    const auto wants = [&](SlotGradient one) { return runs && (wanted[j] & one); };
    sums_A.emplace_back(wants(kSlotA) ? dA[j] : Tensor(), work.tasks_of[j], work.compute, false);
    sums_B.emplace_back(wants(kSlotB) ? dB[j] : Tensor(), work.tasks_of[j], work.compute, true);
    makes_h = makes_h || (wants(kSlotB) && !h.defined());
  }

  if (mask[kGroupedX]) fill_base_rows(work, dx_rows, {});
  if (makes_h) pack_adapters(work, /*lora_B=*/false);
  const int64_t workers = work.workers();
  const bool gathers = any_gathers(work);
  const TaskRows dy_of(dy, gathers, workers), x_of(x, gathers, workers),
      dx_of(dx_rows, gathers, workers);
  const Scratch scratch(work.scratch_bytes(), workers);
  parallel_tasks(work.tasks.size(), [&](int64_t t, int64_t worker) {
    const Task& task = work.tasks[t];
    const CpuSlot& slot = work.slots[task.slot];
    for_pieces(work, task, [&](int64_t begin, int64_t end, bool gathered) {
      const int32_t* rows = work.order + begin;
      if (gathered) {
        dy_of.gather(rows, end - begin, worker);
        x_of.gather(rows, end - begin, worker);
      }
      LoraLinearBackwardArgs args{};
      args.M = M, args.K = work.K, args.N = N, args.r = slot.rank();
      args.dy = dy_of.begin(gathered, rows[0], worker), args.lddy = dy_of.stride(gathered);
      args.x = x_of.begin(gathered, rows[0], worker), args.ldx = x_of.stride(gathered);
      if (h.defined()) args.h = at_element(h, slot.h_begin + (begin - slot.begin) * slot.rank());
      args.lora_A = slot.lora_A.const_data_ptr(), args.lora_A_t = data_or_null(slot.A_t);
      args.lora_B = slot.lora_B.const_data_ptr();
      args.scaling = slot.scaling * (work.factors.defined() ? *work.factor(begin) : 1.0);
      args.dropout = dropout_of(slot, rows);
      args.dx = dx_of.begin(gathered, rows[0], worker);
      args.add = begin > task.begin;
      slot.kernels->backward_rows(args, 0, end - begin, sums_A[task.slot].part(task.index),
                                  sums_B[task.slot].part(task.index), scratch.part(worker));
      if (gathered) dx_of.scatter(rows, end - begin, worker);
    });
  });
  for_slots(n, [&](int64_t j) {
    const CpuSlot& slot = work.slots[j];
    if (!slot.kernels) return;
    sums_A[j].reduce(slot.kernels->reduce_a, 1.0);
    sums_B[j].reduce(slot.kernels->reduce_b, slot.scaling);
  });

  for (int64_t j = 0; j < n; ++j) {
    const CpuSlot& slot = work.slots[j];
    const int64_t rest = wanted[j] & (slot.kernels ? kSlotBias : kSlotA | kSlotB | kSlotBias);
    const bool by_blas = !slot.kernels && slot.rows > 0;
    Tensor bias_gradient = gradient_or_empty(rest & kSlotBias, slot.lora_B, dy.sym_size(1));
    if (slot.rows > 0 && (rest || mask[kGroupedFactor] || (by_blas && mask[kGroupedX]))) {
      composed_slot_backward(slot, dy, x, call.h, order, call.factor, rest,
                             by_blas ? dx_rows : Tensor(), dA[j], dB[j], bias_gradient,
                             mask[kGroupedFactor] ? dfactor : Tensor());
    } else {
      bias_gradient.zero_();
    }
    dlora_bias.push_back(bias_gradient);
  }
  auto [dweight, dbias] = base_gradients(dy, x, mask);
  if (mask[kGroupedX] && dx.numel() > 0) {
    if (is_single_row(work)) {
      dx_rows.add_(at::mm(dy, *call.weight));
    } else {
      add_base_gradient(dx_rows, dy, *call.weight);
    }
  }
  return {dx, dweight, dbias, dfactor, dA, dB, dlora_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_grouped_fwd", flat<&lora_linear_grouped_fwd_cpu>);
  m.impl("lora_linear_grouped_bwd", flat<&lora_linear_grouped_bwd_cpu>);
}

}  // namespace lora_ext
