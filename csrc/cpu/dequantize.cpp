// dequantize on the CPU: each thread some rows.
#include "ops/dequantize.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/backend.h"

namespace lora_ext {
namespace {

Tensor dequantize_cpu(at::TensorList weight, at::IntArrayRef layout, at::ArrayRef<double> numbers,
                      at::ScalarType dtype) {
  const QuantizedFields fields = check_dequantize({weight, layout, numbers}, dtype);
  const QuantizedMatrix matrix = matrix_of(fields);
  const Tensor values = at::empty({fields.N, fields.K}, fields.codes.options().dtype(dtype));
  auto* const out = static_cast<char*>(values.data_ptr());
  const int64_t row_bytes = fields.K * values.element_size();
  constexpr int64_t kMinElements = 32768;  // fewer do not pay for waking a thread
  at::parallel_for(0, fields.N, at::divup(kMinElements, fields.K), [&](int64_t begin, int64_t end) {
    cpu_kernels(dtype).quantized.dequantize(matrix, {begin, end - begin, 0, fields.K},
                                            out + begin * row_bytes, fields.K);
  });
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("dequantize", &dequantize_cpu); }

}  // namespace lora_ext
