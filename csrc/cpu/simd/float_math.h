// The arithmetic of lora_linear_rows.h by fused multiply-add in the compute type.
#pragma once

#include "gemm.h"
#include "rows.h"
#include "store.h"

namespace lora_ext::LORA_EXT_ISA {

template <class T, class TA>
struct FloatMath {
  using Base = T;
  using Sum = compute_t<T>;
  using Hidden = double;  // of h and dh: rounded once, with the factors on them
  using Element = Sum;    // of copied rows

  static constexpr int64_t kPanelRows = 48;  // a multiple of every tile
  static constexpr int64_t kChunk = 1024;    // columns copied at a time
  static constexpr int64_t kSumTerms = 128;  // that one sum adds up in sequence
  // BLAS multiplies fewer rows than these by A's transpose, and any number of rows by one vector,
  // in sums so short that ours have to be in double.
  static constexpr int64_t kFewRows = 16;
  static constexpr int64_t kStride = kChunk + kCacheLine / sizeof(Element);
  static constexpr bool kCopies = true;  // even rows that need no widening: as a stream from memory

  // The scaled h or dh of one panel.
  static int64_t operand_bytes(int64_t r) { return kPanelRows * r * sizeof(Sum); }

  // factor * values [rows, r] as left operand
  static LeftRows<Sum> rows(void* operand, const Hidden* values, int64_t rows, int64_t r,
                            double factor, bool /*exact*/) {
    return {scaled(operand, values, rows * r, factor), r, 1};
  }
  // its transpose
  template <class Value>
  static LeftRows<Sum> columns(void* operand, const Value* values, int64_t rows, int64_t r,
                               double factor, bool /*few*/) {
    return {scaled(operand, values, rows * r, factor), 1, r};
  }
  // rows of x or dy as left operand
  static LeftRows<Sum> left(const Sum* data, int64_t stride, bool /*cold*/) {
    return {data, stride, 1};
  }
  // and as right operand
  static RightRows<Sum> right(const Sum* data, int64_t stride, bool /*cold*/) {
    return {data, stride};
  }
  static RightRows<TA> adapter(const void* data, int64_t stride) {
    return {static_cast<const TA*>(data), stride};
  }
  // of one that is widened before, as [r, K]
  static RightRows<Sum> wide_adapter(const void* data, int64_t stride) {
    return {static_cast<const Sum*>(data), stride};
  }
  static RightRows<Sum> packed(const void* data, int64_t stride) {
    return {static_cast<const Sum*>(data), stride};
  }

  // out [rows, columns], kStride apart = in where kept, else 0
  static void copy(const T* in, int64_t stride, int64_t rows, int64_t columns, const uint16_t* keep,
                   int64_t keep_stride, Sum* out) {
    copy_kept(in, stride, rows, columns, keep, keep_stride, out, kStride);
  }

  // sums [rows, r] = a b of K terms, or += it; in the compute type, before they go to double, only
  // so many in a row.
  template <class B>
  static void hidden_product(int64_t rows, int64_t r, int64_t K, const LeftRows<Sum>& a,
                             const RightRows<B>& b, bool add, bool few, Hidden* sums) {
    if (few && r == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        sums[i] = dot_in<double>(K, a.at(i, 0), b.data) + (add ? sums[i] : 0.0);
      }
      return;
    }
    const int64_t terms = !few ? kSumTerms : rows < 4 ? 8 : 16;
    for (int64_t k = 0; k == 0 || k < K; k += terms) {
      gemm(rows, r, at_most(K - k, terms), a.from(k), b.from(k),
           StoreDouble<Sum>{sums, r, add || k > 0});
    }
  }

  template <class Right, class Store>
  static void product(int64_t rows, int64_t columns, int64_t K, const LeftRows<Sum>& a,
                      const Right& b, const Store& store) {
    gemm(rows, columns, K, a, b, store);
  }
  // The same where the K terms are those of rows of the call.
  template <class Right, class Store>
  static void sum_of_rows(int64_t rows, int64_t columns, int64_t K, const LeftRows<Sum>& a,
                          const Right& b, const Store& store) {
    gemm<true>(rows, columns, K, a, b, store);
  }

 private:
  template <class Value>
  static const Sum* scaled(void* operand, const Value* values, int64_t count, double factor) {
    auto* out = static_cast<Sum*>(operand);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Sum>(factor * values[i]);
    return out;
  }
};

}  // namespace lora_ext::LORA_EXT_ISA
