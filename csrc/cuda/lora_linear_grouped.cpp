// lora_linear_grouped on CUDA: the base product by cuBLAS, the very call of
// torch.nn.functional.linear, so that a row of no adapter is its row; then the kernels add the
// updates of the others, each pass one launch for all adapters, but one for each round of rows
// that have several (rounds_of) where a pass adds to these. What they cannot run is composed,
// one adapter after another.
#include "cuda/lora_linear_grouped.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cuda/lora_linear_calls.h"
#include "cuda/trust.h"
#include "kernels/lora_linear_grouped.h"
#include "ops/lora_linear_grouped_composed.h"
#include "ops/lora_linear_grouped_stack.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

GroupedPath path_on(const CudaCall& call, int capability, bool wrong) {
  return choose_grouped_path(call, call.base == static_cast<int>(at::kHalf), capability,
                             built_for(LORA_EXT_CUDA_TARGETS, capability), cuda_wish(), wrong);
}

// Of rows x or dy, and of x where a backward pass reads it.
GroupedPath path_of(bool backward, const Tensor& rows, const Tensor& x, int64_t N,
                    const GroupedAdapters& adapters) {
  int64_t rank = 1;
  for (const Tensor& lora_A : adapters.lora_A) rank = std::max(rank, lora_A.size(0));
  CudaCall call =
      make_cuda_call(backward, rows.get_device(), rows.size(0), N, adapters.lora_A[0].size(1), rank,
                     rows.scalar_type(), adapters.lora_A[0].scalar_type(), /*dropout=*/false);
  for (const Tensor& matrix : {rows, x}) {
    if (matrix.defined()) call.rows = std::min(call.rows, rows_of(matrix));
  }
  const auto* device = at::cuda::getCurrentDeviceProperties();
  const int capability = device->major * 10 + device->minor;
  const GroupedPath path = path_on(call, capability, false);
  return path.kernels ? path_on(call, capability, !is_trusted(KernelFamily::Sm80)) : path;
}

void print_choice(const char* pass, const Tensor& rows, int64_t N, const GroupedAdapters& adapters,
                  const GroupedPath& path) {
  if (!prints_paths()) return;
  print_path(c10::str("lora_linear_grouped ", pass, " of ", rows.size(0), " rows, ",
                      adapters.lora_A[0].size(1), " -> ", N, ", ", adapters.slots(), " adapters, ",
                      rows.scalar_type()),
             path.name(), path.reason);
}

// The adapters as the kernels take them, and the tensors that they point into.
struct KernelAdapters {
  std::vector<Slot> slots;
  std::vector<Tensor> biases;
  Tensor order, factor, rng_state;
  std::vector<GroupedAdapter> adapters;
  std::vector<GroupedRound> rounds;

  explicit KernelAdapters(const GroupedAdapters& given)
      : slots(slots_of(given)),
        order(given.order.contiguous()),
        factor(as_vector(given.factor, at::kFloat)) {
    if (given.rng_state.has_value()) rng_state = given.rng_state->contiguous();
    for (const Slot& slot : slots) {
      biases.push_back(slot.lora_bias.defined() ? slot.lora_bias.contiguous() : Tensor());
      const double p = slot.dropout.p;
      Dropout dropout{false, 0, 1.0f, nullptr};
      if (slot.dropout.enabled()) {
        dropout = {true, dropout_threshold(p), static_cast<float>(slot.dropout.survivor()),
                   rng_state.const_data_ptr<int64_t>()};
      }
      adapters.push_back({data_or_null(slot.lora_A), data_or_null(slot.lora_B),
                          data_or_null(biases.back()), slot.dtype() == at::kFloat,
                          static_cast<int>(slot.rank()), slot.rows,
                          static_cast<float>(slot.scaling), dropout});
    }
    if (given.rounds.empty()) return;
    for (const SlotRound& one : rounds_of(given)) {
      rounds.push_back({static_cast<int>(one.slot), one.round, one.rows});
    }
  }
  GroupedRows rows() const {
    return {adapters, order.const_data_ptr<int>(), data_or_null<float>(factor), rounds};
  }
};

// f(T{}) with the storage type of a base that the kernels run.
template <class F>
void with_half_type(at::ScalarType base, const F& f) {
  base == at::kBFloat16 ? f(Bf16{}) : f(Fp16{});
}

std::tuple<Tensor, Tensor> lora_linear_grouped_fwd_cuda(const LoraLinearGroupedCall& call,
                                                        bool return_h) {
  check_lora_linear_grouped(call);
  if (call.stacked()) return lora_linear_grouped_fwd_by_matrix(call, return_h);
  const c10::cuda::CUDAGuard guard(call.x.device());
  const GroupedAdapters given = call.adapters();
  const Tensor x = as_rows(call.x);
  const int64_t M = x.size(0), N = call.weight.size(0);
  const GroupedPath path = path_of(false, x, Tensor(), N, given);
  print_choice("forward", x, N, given, path);
  if (!path.kernels || x.numel() == 0) return lora_linear_grouped_fwd_composed(call, return_h);

  const Tensor y = at::linear(call.x, call.weight, call.bias).contiguous();
  const Tensor h =
      at::empty({return_h ? grouped_hidden_size(given) : 0}, x.options().dtype(at::kFloat));
  const KernelAdapters adapters(given);
  CudaScratch scratch(x.options());
  with_half_type(x.scalar_type(), [&](auto base) {
    using T = decltype(base);
    const GroupedForwardCall<T> of_kernels{.rows = adapters.rows(),
                                           .x = matrix<T>(x),
                                           .y = out_or_null<T>(y.view({M, N})),
                                           .N = N,
                                           .h = return_h ? out_or_null<float>(h) : nullptr};
    run_grouped_forward(of_kernels, scratch.allocator(), at::cuda::getCurrentCUDAStream());
  });
  return {y, h};
}

GroupedResults lora_linear_grouped_bwd_cuda(const LoraLinearGroupedBackwardCall& call,
                                            GroupedMask mask, at::IntArrayRef wanted) {
  check_lora_linear_grouped_bwd(call, mask, wanted);
  if (call.stacked()) return lora_linear_grouped_bwd_by_matrix(call, mask, wanted);
  const c10::cuda::CUDAGuard guard(call.dy.device());
  const GroupedAdapters given = call.adapters();
  const Tensor dy = as_rows(call.dy), x = call.x.has_value() ? as_rows(*call.x) : Tensor();
  const int64_t M = dy.size(0), N = dy.size(1), K = call.lora_A[0].size(1);
  const GroupedPath path = path_of(true, dy, x, N, given);
  print_choice("backward", dy, N, given, path);
  if (!path.kernels || M == 0) return lora_linear_grouped_bwd_composed(call, mask, wanted);

  Tensor dx = gradient_or_empty(false, dy);
  if (mask[kGroupedX]) dx = at::mm(dy, *call.weight).view_symint(with_width(call.dy, K));
  const auto in_float = dy.options().dtype(at::kFloat);
  const Tensor dfactor =
      mask[kGroupedFactor] ? at::zeros(call.factor->sizes(), in_float) : Tensor();
  const Tensor h = call.h.has_value() ? call.h->contiguous() : Tensor();
  KernelAdapters adapters(given);
  TensorVector dA, dB, dlora_bias;
  for (size_t j = 0; j < given.slots(); ++j) {
    const Slot& slot = adapters.slots[j];
    GroupedAdapter& own = adapters.adapters[j];
    const auto make = [&](TensorVector& of, SlotGradient one, auto&&... like) {
      const bool is_wanted = wanted[j] & one;
      of.push_back(gradient_or_empty(is_wanted, like...));
      return is_wanted ? of.back().data_ptr() : nullptr;
    };
    own.dA = make(dA, kSlotA, slot.lora_A);
    own.dB = make(dB, kSlotB, slot.lora_B);
    own.dlora_bias = make(dlora_bias, kSlotBias, slot.lora_B, dy.sym_size(1));
  }
  CudaScratch scratch(dy.options());
  with_half_type(dy.scalar_type(), [&](auto base) {
    using T = decltype(base);
    const GroupedBackwardCall<T> of_kernels{.rows = adapters.rows(),
                                            .dy = matrix<T>(dy),
                                            .x = matrix<T>(x, M, K),
                                            .h = data_or_null<float>(h),
                                            .K = K,
                                            .dx = mask[kGroupedX] ? out_or_null<T>(dx) : nullptr,
                                            .dfactor = out_or_null<float>(dfactor)};
    run_grouped_backward(of_kernels, scratch.allocator(), at::cuda::getCurrentCUDAStream());
  });
  auto [dweight, dbias] = base_gradients(dy, x, mask);
  return {
      dx,
      dweight,
      dbias,
      mask[kGroupedFactor] ? dfactor.to(call.factor->scalar_type()) : at::empty({0}, dy.options()),
      dA,
      dB,
      dlora_bias};
}

}  // namespace

std::pair<std::string, std::string> explain_lora_linear_grouped_cuda(CudaCall call,
                                                                     int compute_capability) {
  const bool wrong = found_wrong(KernelFamily::Sm80, call.device);
  const GroupedPath path = path_on(call, compute_capability, wrong);
  return {path.name(), path.reason};
}

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear_grouped_fwd", flat<&lora_linear_grouped_fwd_cuda>);
  m.impl("lora_linear_grouped_bwd", flat<&lora_linear_grouped_bwd_cuda>);
}

}  // namespace lora_ext
