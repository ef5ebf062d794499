// The product of the base layer and its gradient in x, which every backend adds to the low-rank
// part, or makes before it. Of a dense matrix it is BLAS's; of a quantized one see
// cpu/quantized_product.h.
#pragma once

#include <string>

#include "ops/product.h"

namespace lora_ext {

// How it is made, for `explain` and LORA_EXT_PRINT_PATHS: added to the low-rank part's.
struct BasePath {
  std::string path, reason;
};

class BaseProduct {
 public:
  virtual ~BaseProduct() = default;
  // y [M, N] = x [M, K] W^T
  virtual void write(const Tensor& y, const Tensor& x) const = 0;
  // y += x W^T, rounded once
  virtual void add(const Tensor& y, const Tensor& x) const = 0;
  // dx [M, K] += dy [M, N] W, rounded once
  virtual void add_gradient(const Tensor& dx, const Tensor& dy) const = 0;
  // dy W, apart
  virtual Tensor gradient(const Tensor& dy) const = 0;
  // Of M rows, forward or for dx; nothing where the matrix is dense.
  virtual std::optional<BasePath> path(int64_t /*M*/, bool /*forward*/) const {
    return std::nullopt;
  }
};

class DenseProduct final : public BaseProduct {
 public:
  explicit DenseProduct(const Tensor& weight)
      : weight_(weight) {}  // [N, K], which has to outlive it

  void write(const Tensor& y, const Tensor& x) const override { product_out(y, x, weight_.t()); }
  void add(const Tensor& y, const Tensor& x) const override { add_product_(y, x, weight_.t()); }
  void add_gradient(const Tensor& dx, const Tensor& dy) const override {
    add_product_(dx, dy, weight_);
  }
  Tensor gradient(const Tensor& dy) const override { return product(dy, weight_); }

 private:
  const Tensor& weight_;
};

}  // namespace lora_ext
