// dequantize on CUDA: one launch, nested scales inside. The result is in torch's caching allocator,
// freed after the product that reads it: layers after one another on a stream share one scratch.
#include "ops/dequantize.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/operands.h"
#include "kernels/dequantize.h"

namespace lora_ext {
namespace {

Tensor dequantize_cuda(at::TensorList weight, at::IntArrayRef layout, at::ArrayRef<double> numbers,
                       at::ScalarType dtype) {
  const QuantizedFields fields = check_dequantize({weight, layout, numbers}, dtype);
  const c10::cuda::CUDAGuard guard(fields.codes.device());
  // Values are float's at most.
  const at::ScalarType made = dtype == at::kDouble ? at::kFloat : dtype;
  const Tensor values = at::empty({fields.N, fields.K}, fields.codes.options().dtype(made));
  with_base_type(made, [&](auto base) {
    using T = decltype(base);
    dequantize(DequantizeCall<T>{matrix_of(fields), static_cast<T*>(values.data_ptr())},
               at::cuda::getCurrentCUDAStream());
  });
  return values.to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl("dequantize", &dequantize_cuda); }

}  // namespace lora_ext
