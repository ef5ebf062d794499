// What becomes of the sums of a product (see gemm.h): functors of (row, column, sums, lanes).
#pragma once

#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

// sums[i][j] = result, or += result
template <class S>
struct StoreSum {
  S* sums;
  int64_t stride;
  bool add;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    S* p = sums + i * stride + j;
    if (add) result = Vec<S>::add(result, load_lanes<S>(p, lanes));
    store_lanes<S>(p, result, lanes);
  }
};

// The same with sums in double.
template <class S>
struct StoreDouble {
  double* sums;
  int64_t stride;
  bool add;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    using D = Vec<double>;
    S values[Vec<S>::kWidth];
    Vec<S>::store(values, result);
    for (int l = 0; l < lanes; l += D::kWidth) {
      double* p = sums + i * stride + j + l;
      const int left = lanes - l < D::kWidth ? lanes - l : D::kWidth;
      auto sum = D::load(values + l);
      if (add) sum = D::add(sum, load_lanes<double>(p, left));
      store_lanes<double>(p, sum, left);
    }
  }
};

// out[i][j] = result + bias, or result where kept; or += it
template <class S, class T>
struct StoreRounded {
  T* out;
  int64_t stride;
  const S* bias;
  const uint16_t* keep;
  int64_t keep_stride;
  bool add;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    T* p = out + i * stride + j;
    if (bias) result = Vec<S>::add(result, load_lanes<S>(bias + j, lanes));
    if (keep) result = Vec<S>::keep(result, bits_at(keep + i * keep_stride, j));
    if (add) result = Vec<S>::add(result, load_lanes<S>(p, lanes));
    store_lanes<S>(p, result, lanes);
  }
};

// weight[i][j] = weight[i][j] * factor + result, if `write`, the factor being row_factor[i] or
// column_factor[j] or, both null, 1; `finite` becomes false where the sum, rounded, is not.
template <class S, class T>
struct StoreMerged {
  T* weight;
  int64_t stride;
  const S* row_factor;
  const S* column_factor;
  bool write;
  bool* finite;

  void operator()(int64_t i, int64_t j, typename Vec<S>::Reg result, int lanes) const {
    T* p = weight + i * stride + j;
    auto sum = load_lanes<S>(p, lanes);
    if (row_factor) sum = Vec<S>::mul(sum, Vec<S>::set1(row_factor[i]));
    if (column_factor) sum = Vec<S>::mul(sum, load_lanes<S>(column_factor + j, lanes));
    sum = Vec<S>::add(sum, result);
    T rounded[Vec<S>::kWidth];
    Vec<S>::store(rounded, sum);  // an overflow of the storage type shows only after rounding
    *finite &= Vec<S>::all_finite(Vec<S>::load_partial(rounded, lanes));
    if (write) store_lanes<S>(p, sum, lanes);
  }
};

}  // namespace lora_ext::LORA_EXT_ISA
