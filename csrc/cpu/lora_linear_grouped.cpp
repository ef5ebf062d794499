// lora_linear_grouped on the CPU: lora_linear's kernels over ranges of rows of one slot
// (lora_linear_grouped_work.h), the base product over all rows.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "cpu/lora_linear.h"
#include "cpu/lora_linear_grouped_work.h"
#include "ops/lora_linear_grouped_composed.h"
#include "ops/lora_linear_grouped_stack.h"
#include "ops/operator.h"
#include "ops/product.h"

namespace lora_ext {
namespace {

void pack_adapters(GroupedWork& work, bool lora_B) {
  std::vector<CpuSlot*> slots;
  for (CpuSlot& slot : work.slots) {
    if (slot.kernels && slot.rows > (lora_B ? kUnpackedRows : 0)) slots.push_back(&slot);
  }
  for_slots(slots.size(), [&](int64_t i) {
    CpuSlot& slot = *slots[i];
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

// The rows of no slot with kernels: of bias, or 0.
void fill_base_rows(const GroupedWork& work, const Tensor& out, const Tensor& bias) {
  const Tensor row = bias.defined() ? bias.to(out.scalar_type()).contiguous() : Tensor();
  const int64_t bytes = out.size(1) * out.element_size();
  at::parallel_for(0, work.M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (work.rounds[m] > 0) continue;
      char* p = at_element(out, m * out.stride(0));
      if (row.defined()) {
        std::memcpy(p, row.const_data_ptr(), bytes);
      } else {
        std::memset(p, 0, bytes);
      }
    }
  });
}

// The rows that no adapter does anything to.
Tensor rows_of_base(const GroupedWork& work) {
  std::vector<bool> found(work.M, false);
  for (const CpuSlot& slot : work.slots) {
    if ((slot.rank() == 0 && !slot.lora_bias.defined()) || slot.scaling == 0.0) continue;
    for (int64_t i = slot.begin; i < slot.begin + slot.rows; ++i) {
      if (const double* factor = work.factor(i); !factor || *factor != 0.0) {
        found[work.order[i]] = true;
      }
    }
  }
  std::vector<int64_t> rows;
  for (int64_t m = 0; m < work.M; ++m) {
    if (!found[m]) rows.push_back(m);
  }
  return at::tensor(rows, at::kLong);
}

// out += a b, as lora_linear makes it. Where that is not what nn.functional.linear makes, the rows
// of no adapter are made as that: of_base(a's rows). A single one beside itself, as one of several.
template <class F>
void add_base_product(const GroupedWork& work, const Tensor& out, const Tensor& a, const Tensor& b,
                      const F& of_base) {
  add_product_(out, a, b);
  if (!widens_product(out.size(0), out.size(1), a.size(1), a.scalar_type())) return;
  const Tensor rows = rows_of_base(work);
  if (rows.numel() == 0) return;
  const Tensor gathered = a.index_select(0, rows.numel() == 1 ? rows.expand(2) : rows);
  out.index_copy_(0, rows, of_base(gathered).narrow(0, 0, rows.numel()));
}

// BLAS adds the product of a single row to what is there term by term, in memory (see
// lora_linear.cpp): it is made apart.
bool is_single_row(const GroupedWork& work) { return work.M == 1 && work.compute == work.base; }

// Of one matrix, into y_rows [M, N] and, where it is defined, h.
void forward_of_matrix(const LoraLinearGroupedCall& call, const Tensor& y_rows, const Tensor& h) {
  const Tensor x = as_rows(call.x), order = call.order.contiguous();
  const int64_t M = x.size(0), N = call.weight.size(0);
  const GroupedAdapters adapters = call.adapters_of(order);
  GroupedWork work(adapters, M, N, x.scalar_type());
  const Tensor bias = as_vector(call.bias, work.compute);

  pack_adapters(work, /*lora_B=*/true);
  fill_base_rows(work, y_rows, bias);
  const int64_t workers = work.workers();
  const bool gathers = any_gathers(work);
  const TaskRows x_of(x, gathers, workers), y_of(y_rows, gathers, workers);
  const Scratch scratch(work.scratch_bytes(), workers);
  work.for_tasks([&](const Task& task, int64_t worker) {
    const CpuSlot& slot = work.slots[task.slot];
    const bool later = task.round > 0, biased = slot.lora_bias.defined();
    for_pieces(work, task, biased, [&](int64_t begin, int64_t end, bool gathered) {
      const int32_t* rows = work.order + begin;
      const double* factor = work.factor(begin);
      const Tensor total_bias =
          slot_bias(slot, later ? Tensor() : bias, slot.scaling * (factor ? *factor : 1.0));
      if (gathered) {
        x_of.gather(rows, end - begin, worker);
        if (later) y_of.gather(rows, end - begin, worker);
      }
      LoraLinearForwardArgs args{};
      args.M = M, args.K = work.K, args.N = N, args.r = slot.rank();
      args.x = x_of.begin(gathered, rows[0], worker), args.ldx = x_of.stride(gathered);
      args.lora_A_t = data_or_null(slot.A_t), args.lora_B_t = data_or_null(slot.B_t);
      args.lora_A = slot.lora_A.const_data_ptr(), args.lora_B = slot.lora_B.const_data_ptr();
      args.bias = data_or_null(total_bias);
      args.scaling = slot.scaling, args.row_factors = factor;
      args.dropout = dropout_of(slot, rows);
      args.add_y = later;
      args.y = y_of.begin(gathered, rows[0], worker);
      if (h.defined()) args.h = at_element(h, slot.h_begin + (begin - slot.begin) * slot.rank());
      const auto run =
          slot.rows <= kUnpackedRows ? slot.kernels->single_rows : slot.kernels->forward_rows;
      run(args, 0, end - begin, scratch.part(worker));
      if (gathered) y_of.scatter(rows, end - begin, worker);
    });
  });
  for (const CpuSlot& slot : work.slots) {
    if (!slot.kernels && slot.rows > 0) {
      composed_slot_forward(slot, x, order, call.factor, y_rows, h);
    }
  }

  if (is_single_row(work)) {
    y_rows.add_(at::mm(x, call.weight.t()));
  } else {
    add_base_product(work, y_rows, x, call.weight.t(),
                     [&](const Tensor& rows) { return at::linear(rows, call.weight, call.bias); });
  }
}

// That all rows are in its only slot says their number, if each is there once.
void check_all_rows(const MatrixPart& part) {
  const Tensor order = part.order.contiguous();
  const int32_t* rows = order.const_data_ptr<int32_t>();
  std::vector<bool> found(part.rows, false);
  for (int64_t i = 0; i < part.rows; ++i) {
    check_row(rows[i], part.rows);
    TORCH_CHECK_VALUE(!found[rows[i]], "lora_linear_grouped: order: got row ", rows[i],
                      " twice in one slot, expected it once");
    found[rows[i]] = true;
  }
}

// f(rows [rows, width]) writes those of a part. A single one is copied: BLAS sums it up in an order
// that depends on where it lies, and a call of its own begins at a multiple of the vectors' size.
template <class F>
void write_part(const Tensor& all, const MatrixPart& part, const F& f) {
  const Tensor place = all.defined() ? all.narrow(0, part.begin, part.rows) : all;
  const bool apart = part.rows == 1 && all.defined();
  const Tensor rows = apart ? at::empty_like(place) : place;
  f(rows);
  if (apart) place.copy_(rows);
}

// nn.functional.linear, into y.
void write_base(const ForwardPart& part, Tensor y) {
  if (part.bias.has_value()) {
    at::addmm_out(y, *part.bias, part.x, part.weight.t());
  } else {
    at::mm_out(y, part.x, part.weight.t());
  }
}

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_cpu(const LoraLinearGroupedCall& call,
                                                       bool return_h) {
  check_lora_linear_grouped(call);
  const int64_t N = call.weight.size(-2);
  const auto compute = call.x.options().dtype(at::toOpMathType(call.x.scalar_type()));
  const Tensor y = at::empty_symint(with_width(call.x, N), call.x.options());
  const Tensor h = at::empty({return_h ? grouped_hidden_size(call.adapters()) : 0}, compute);
  const Tensor y_rows = y.view({count_rows(y).expect_int(), N});
  if (y.numel() == 0) {
    h.zero_();
  } else if (!call.stacked()) {
    forward_of_matrix(call, y_rows, return_h ? h : Tensor());
  } else {
    for (const ForwardPart& part : parts_of(call)) {
      const Tensor own_h = return_h ? h.narrow(0, part.h_begin, part.h_size) : Tensor();
      write_part(y_rows, part, [&](const Tensor& own_y) {
        if (part.is_base()) {
          write_base(part, own_y);
        } else if (part.is_lora_linear()) {
          check_all_rows(part);
          const int64_t r = part.lora_A[0].size(0);
          lora_linear_fwd_into(part.lora_linear(), own_y,
                               return_h ? own_h.view({part.rows, r}) : Tensor());
        } else {
          forward_of_matrix(part.grouped(), own_y, own_h);
        }
      });
    }
  }
  return {y, h};
}

// What lora_bias adds to the gradients of the factors of its slot's rows.
void add_bias_to_factors(const Slot& slot, const Tensor& dy, const Tensor& order,
                         const Tensor& dfactors) {
  const Tensor rows = dy.index_select(0, order.narrow(0, slot.begin, slot.rows));
  const Tensor gradient = at::mv(rows.to(slot.lora_bias.scalar_type()), slot.lora_bias);
  dfactors.narrow(0, slot.begin, slot.rows).add_(gradient, slot.scaling);
}

// Of one matrix; the gradient of x into dx_rows [M, K] where it is wanted.
GroupedResults backward_of_matrix(const LoraLinearGroupedBackwardCall& call,
                                  const GroupedMask& mask, at::IntArrayRef wanted,
                                  const Tensor& dx_rows) {
  const Tensor dy = as_rows(call.dy), x = call.x.has_value() ? as_rows(*call.x) : Tensor();
  const Tensor order = call.order.contiguous();
  const GroupedAdapters adapters = call.adapters_of(order);
  const int64_t M = dy.size(0), N = dy.size(1);
  GroupedWork work(adapters, M, N, dy.scalar_type());
  const auto n = static_cast<int64_t>(work.slots.size());
  const Tensor dfactors =
      mask[kGroupedFactor] ? at::zeros({order.numel()}, dy.options().dtype(at::kDouble)) : Tensor();
  const Tensor h = call.h.has_value() ? call.h->contiguous() : Tensor();

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
  work.for_tasks([&](const Task& task, int64_t worker) {
    const CpuSlot& slot = work.slots[task.slot];
    for_pieces(work, task, false, [&](int64_t begin, int64_t end, bool gathered) {
      const int32_t* rows = work.order + begin;
      if (gathered) {
        dy_of.gather(rows, end - begin, worker);
        x_of.gather(rows, end - begin, worker);
        if (task.round > 0) dx_of.gather(rows, end - begin, worker);
      }
      LoraLinearBackwardArgs args{};
      args.M = M, args.K = work.K, args.N = N, args.r = slot.rank();
      args.dy = dy_of.begin(gathered, rows[0], worker), args.lddy = dy_of.stride(gathered);
      args.x = x_of.begin(gathered, rows[0], worker), args.ldx = x_of.stride(gathered);
      if (h.defined()) args.h = at_element(h, slot.h_begin + (begin - slot.begin) * slot.rank());
      args.lora_A = slot.lora_A.const_data_ptr(), args.lora_A_t = data_or_null(slot.A_t);
      args.lora_B = slot.lora_B.const_data_ptr();
      args.scaling = slot.scaling, args.row_factors = work.factor(begin);
      if (dfactors.defined()) args.drow_factors = dfactors.data_ptr<double>() + begin;
      args.dropout = dropout_of(slot, rows);
      args.dx = dx_of.begin(gathered, rows[0], worker);
      args.add_dx = task.round > 0;
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
    if (slot.rows > 0 && (rest || (by_blas && (mask[kGroupedX] || mask[kGroupedFactor])))) {
      composed_slot_backward(slot, dy, x, call.h, order, call.factor, rest,
                             by_blas ? dx_rows : Tensor(), dA[j], dB[j], bias_gradient,
                             by_blas ? dfactors : Tensor());
    } else {
      bias_gradient.zero_();
    }
    if (slot.kernels && slot.rows > 0 && dfactors.defined() && slot.lora_bias.defined()) {
      add_bias_to_factors(slot, dy, order, dfactors);
    }
    dlora_bias.push_back(bias_gradient);
  }
  const Tensor dfactor =
      dfactors.defined() ? dfactors.to(call.factor->scalar_type()) : at::empty({0}, dy.options());
  auto [dweight, dbias] = base_gradients(dy, x, mask);
  if (mask[kGroupedX] && dx_rows.numel() > 0) {
    if (is_single_row(work)) {
      dx_rows.add_(at::mm(dy, *call.weight));
    } else {
      add_base_product(work, dx_rows, dy, *call.weight,
                       [&](const Tensor& rows) { return at::mm(rows, *call.weight); });
    }
  }
  return {dx_rows, dweight, dbias, dfactor, dA, dB, dlora_bias};
}

GroupedResults lora_linear_grouped_bwd_cpu(const LoraLinearGroupedBackwardCall& call,
                                           GroupedMask mask, at::IntArrayRef wanted) {
  check_lora_linear_grouped_bwd(call, mask, wanted);
  const int64_t K = call.lora_A[0].size(1);
  const Tensor dx = gradient_or_empty(mask[kGroupedX], call.dy, with_width(call.dy, K));
  const int64_t M = count_rows(call.dy).expect_int();
  const Tensor dx_rows = mask[kGroupedX] ? dx.view({M, K}) : Tensor();
  if (!call.stacked()) {
    GroupedResults results = backward_of_matrix(call, mask, wanted, dx_rows);
    std::get<0>(results) = dx;
    return results;
  }
  const auto of_part = [&](const BackwardPart& part, GroupedMask of, at::IntArrayRef own) {
    GroupedResults results;
    write_part(dx_rows, part, [&](Tensor own_dx) {
      if (part.is_base()) {
        if (of[kGroupedX]) at::mm_out(own_dx, part.dy, *part.weight);
        of[kGroupedX] = false;
        results = base_part_gradients(part, of);
      } else if (part.is_lora_linear()) {
        results = grouped_results(
            lora_linear_bwd_into(part.lora_linear(), lora_linear_mask(of, own[0]), own_dx));
      } else {
        results = backward_of_matrix(part.grouped(), of, own, own_dx);
      }
    });
    return results;
  };
  return collect_gradients(call, mask, wanted, of_part, dx);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear_grouped_fwd", flat<&lora_linear_grouped_fwd_cpu>);
  m.impl("lora_linear_grouped_bwd", flat<&lora_linear_grouped_bwd_cpu>);
}

}  // namespace lora_ext
