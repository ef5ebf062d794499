// Schemas, dispatcher handles, checks and Meta kernels of draw_rng_state, dropout_mask and dropout.
#include "ops/dropout.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../common/dropout.h"
#include "ops/checks.h"
#include "ops/operator.h"
#include "ops/transforms.h"

namespace lora_ext {
namespace {

Tensor draw_rng_state_meta(const Tensor& like) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

Tensor dropout_mask_meta(const Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                         double dropout_p, c10::SymInt first_row) {
  check_dropout_mask(rng_state, rows, columns, dropout_p, first_row);
  return rng_state.new_empty_symint({rows, columns}, rng_state.options().dtype(at::kBool));
}

Tensor dropout_meta(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  check_dropout(x, rng_state, dropout_p);
  return x.new_empty_symint(x.sym_sizes());
}

Tensor dropout_composed(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  check_dropout(x, rng_state, dropout_p);
  const Tensor keep = dropout_mask(rng_state, count_rows(x), x.sym_size(-1), dropout_p)
                          .reshape_symint(x.sym_sizes());
  return at::where(keep, x * dropout_scale(dropout_p), at::zeros({}, x.options())).contiguous();
}

// dropout is linear and its own transpose, so its gradient is dropout of the gradient.
struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                        const Tensor& rng_state, double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({rng_state});
    ctx->saved_data["dropout_p"] = dropout_p;
    return dropout(x, rng_state, dropout_p);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& dy) {
    const Tensor rng_state = ctx->get_saved_variables()[0];
    return {dropout(dy[0], rng_state, ctx->saved_data["dropout_p"].toDouble()), Tensor(), Tensor()};
  }
};

Tensor dropout_autograd(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  if (has_tangent(x)) return dropout_composed(x, rng_state, dropout_p);
  return DropoutFunction::apply(x, rng_state, dropout_p);
}

// In vmap: by ATen's own draw, which obeys `randomness`: one state for all, one for each, or none.
Tensor draw_rng_state_vmap(const Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, options);
  return at::cat({seed, at::zeros({1}, options)});
}

// In vmap: the mask of each state of a batch.
Tensor dropout_mask_batched(const Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                            double dropout_p, c10::SymInt first_row) {
  const c10::impl::ExcludeDispatchKeyGuard no_batches(c10::DispatchKey::FuncTorchBatched);
  const auto* batch = at::functorch::maybeGetBatchedImpl(rng_state);
  std::vector<Tensor> masks;
  for (const Tensor& state : batch->value().unbind(batch->bdim())) {
    masks.push_back(dropout_mask(state, rows, columns, dropout_p, first_row));
  }
  return at::functorch::makeBatched(at::stack(masks), 0, batch->level());
}

}  // namespace

void check_dropout(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  constexpr const char* op = "dropout";
  check_dense(op, "x", x);
  check_base_dtype(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x: got a 0-d tensor, expected [..., columns]");
  check_dropout_p(op, dropout_p);
  check_device(op, "rng_state", rng_state, x);
  check_rng_state(op, rng_state);
}

void check_dropout_mask(const Tensor& rng_state, const c10::SymInt& rows,
                        const c10::SymInt& columns, double dropout_p,
                        const c10::SymInt& first_row) {
  constexpr const char* op = "dropout_mask";
  check_dense(op, "rng_state", rng_state);
  check_rng_state(op, rng_state);
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, op, ": rows, columns: got ", rows, ", ", columns,
                    ", expected sizes of at least 0");
  TORCH_CHECK_VALUE(first_row >= 0, op, ": first_row: got ", first_row, ", expected at least 0");
  check_dropout_p(op, dropout_p);
}

Tensor draw_rng_state(const Tensor& like) {
  static const Operator<&draw_rng_state> op("lora_ext::draw_rng_state");
  return op(like);
}

Tensor dropout_mask(const Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                    double dropout_p, c10::SymInt first_row) {
  static const Operator<&dropout_mask> op("lora_ext::dropout_mask");
  return op(rng_state, rows, columns, dropout_p, first_row);
}

Tensor dropout(const Tensor& x, const Tensor& rng_state, double dropout_p) {
  static const Operator<&dropout> op("lora_ext::dropout");
  return op(x, rng_state, dropout_p);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("draw_rng_state(Tensor like) -> Tensor",
        {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def(
      "dropout_mask(Tensor rng_state, SymInt rows, SymInt columns, float dropout_p, "
      "SymInt first_row=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("dropout(Tensor x, Tensor rng_state, float dropout_p) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("draw_rng_state", &draw_rng_state_meta);
  m.impl("dropout_mask", &dropout_mask_meta);
  m.impl("dropout", &dropout_meta);
}

TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) { m.impl("dropout", &dropout_composed); }

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("dropout", &dropout_composed);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchVmapMode, m) {
  m.impl("draw_rng_state", &draw_rng_state_vmap);
}

TORCH_LIBRARY_IMPL(lora_ext, FuncTorchBatched, m) { m.impl("dropout_mask", &dropout_mask_batched); }

TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) { m.impl("dropout", &dropout_autograd); }

}  // namespace lora_ext
