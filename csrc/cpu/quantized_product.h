// The base product of a quantized matrix on the CPU: parts of it are dequantized into scratch that
// lies in cache, and multiplied by BLAS there; few rows are multiplied by the codes. The matrix is
// never written down.
#pragma once

#include "cpu/kernels.h"
#include "ops/base_product.h"
#include "quant/quantized_weight.h"

namespace lora_ext {

class QuantizedProduct final : public BaseProduct {
 public:
  // Of values in `dtype`. The fields have to outlive it.
  QuantizedProduct(const QuantizedFields& fields, at::ScalarType dtype);

  void write(const Tensor& y, const Tensor& x) const override { forward(y, x, false); }
  void add(const Tensor& y, const Tensor& x) const override { forward(y, x, true); }
  void add_gradient(const Tensor& dx, const Tensor& dy) const override;
  Tensor gradient(const Tensor& dy) const override;
  std::optional<BasePath> path(int64_t M, bool forward) const override;

 private:
  void forward(const Tensor& y, const Tensor& x, bool add) const;
  void few_rows(const Tensor& y, const Tensor& x, bool add) const;

  const QuantizedMatrix matrix_;
  const at::ScalarType dtype_;
  const QuantizedKernels& kernels_;
};

BasePath quantized_base_path(int64_t M, int64_t N, int64_t K, at::ScalarType dtype, bool forward);

}  // namespace lora_ext
