// Schema, dispatcher handle, checks and Meta kernel of dequantize, and its form out of ATen's
// operators.
#include "ops/dequantize.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace lora_ext {
namespace {

using Dequantize = Tensor(at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::ScalarType);

Tensor dequantize_meta(at::TensorList weight, at::IntArrayRef layout, at::ArrayRef<double> numbers,
                       at::ScalarType dtype) {
  const QuantizedFields fields = check_dequantize({weight, layout, numbers}, dtype);
  return at::empty({fields.N, fields.K}, fields.codes.options().dtype(dtype));
}

Tensor dequantize_composed(at::TensorList weight, at::IntArrayRef layout,
                           at::ArrayRef<double> numbers, at::ScalarType dtype) {
  return dequantized(check_dequantize({weight, layout, numbers}, dtype), dtype);
}

}  // namespace

QuantizedFields check_dequantize(const QuantizedWeight& weight, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(!weight.tensors.empty(),
                    "dequantize: weight: got no tensors, expected those "
                    "of a lora_ext.quant.QuantizedWeight");
  TORCH_CHECK_TYPE(is_lora_base_dtype(dtype), "dequantize: dtype: got ", dtype_name(dtype),
                   ", expected float64, float32, bfloat16 or float16");
  return checked_fields("dequantize", weight, weight.tensors[0]);
}

Tensor dequantize(const QuantizedWeight& weight, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lora_ext::dequantize", "")
                             .typed<Dequantize>();
  return op.call(weight.tensors, weight.layout, weight.numbers, dtype);
}

TORCH_LIBRARY_FRAGMENT(lora_ext, m) {
  m.def("dequantize(Tensor[] weight, int[] layout, float[] numbers, ScalarType dtype) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lora_ext, Meta, m) { m.impl("dequantize", &dequantize_meta); }
TORCH_LIBRARY_IMPL(lora_ext, CompositeExplicitAutograd, m) {
  m.impl("dequantize", &dequantize_composed);
}
TORCH_LIBRARY_IMPL(lora_ext, Autograd, m) {
  m.impl("dequantize", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace lora_ext
