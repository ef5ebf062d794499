// Schemas, dispatcher handles and Meta kernels of draw_rng_state and dropout_mask.
#include "ops/dropout.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace lora_ext {
namespace {

at::Tensor draw_rng_state_meta(const at::Tensor& like) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

at::Tensor dropout_mask_meta(const at::Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                             double dropout_p) {
  check_dropout_mask(rng_state, rows, columns, dropout_p);
  return rng_state.new_empty_symint({rows, columns}, rng_state.options().dtype(at::kBool));
}

}  // namespace

at::Tensor draw_rng_state(const at::Tensor& like) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lora_ext::draw_rng_state", "")
                             .typed<at::Tensor(const at::Tensor&)>();
  return op.call(like);
}

at::Tensor dropout_mask(const at::Tensor& rng_state, c10::SymInt rows, c10::SymInt columns,
                        double dropout_p) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lora_ext::dropout_mask", "")
          .typed<at::Tensor(const at::Tensor&, c10::SymInt, c10::SymInt, double)>();
  return op.call(rng_state, rows, columns, dropout_p);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("draw_rng_state(Tensor like) -> Tensor",
        {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def("dropout_mask(Tensor rng_state, SymInt rows, SymInt columns, float dropout_p) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) {
  m.impl("draw_rng_state", &draw_rng_state_meta);
  m.impl("dropout_mask", &dropout_mask_meta);
}

}  // namespace lora_ext
