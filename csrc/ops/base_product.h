// The product of the base layer and its gradient in x, which every backend adds to the low-rank
// part, or makes before it. Dense: a matrix, multiplied by BLAS.
#pragma once

#include "ops/product.h"

namespace lora_ext {

class BaseProduct {
 public:
  explicit BaseProduct(const Tensor& weight)
      : weight_(weight) {}  // [N, K], which has to outlive it

  // y [M, N] = x [M, K] W^T
  void write(const Tensor& y, const Tensor& x) const { product_out(y, x, weight_.t()); }
  // y += x W^T, rounded once
  void add(const Tensor& y, const Tensor& x) const { add_product_(y, x, weight_.t()); }
  // dx [M, K] += dy [M, N] W, rounded once
  void add_gradient(const Tensor& dx, const Tensor& dy) const { add_product_(dx, dy, weight_); }
  // dy W, apart
  Tensor gradient(const Tensor& dy) const { return product(dy, weight_); }

 private:
  const Tensor& weight_;
};

}  // namespace lora_ext
