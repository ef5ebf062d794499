// Values of quantized matrices. Of codes of 4 bits a block has sixteen values: these are computed,
// by the formula of quantized_matrix.h, and looked up.
#pragma once

#include <type_traits>

#include "../quantized_kernels.h"
#include "quantized_codes.h"

namespace lora_ext::LORA_EXT_ISA {

// a, rounded to T and widened again
template <class T>
inline Vec<float>::Reg through(Vec<float>::Reg a) {
  if constexpr (sizeof(T) == 2) {
    T room[Vec<float>::kWidth];
    Vec<float>::store(room, a);
    return Vec<float>::load(room);
  } else {
    return a;
  }
}

// The numbers of one block. What there is none of is -0, which a sum does not change by.
template <class T>
struct BlockFormula {
  using V = Vec<float>;
  V::Reg minus_zero_point, scale, factor, shift;
  QuantFloat rounding;

  V::Reg operator()(V::Reg value) const {
    value = V::mul(V::mul(V::add(value, minus_zero_point), scale), factor);
    value = V::add(apart(value), shift);
    if (rounding == QuantFloat::F16 && !std::is_same_v<T, Half>) value = through<Half>(value);
    if (rounding == QuantFloat::BF16 && !std::is_same_v<T, BFloat16>) {
      value = through<BFloat16>(value);
    }
    return through<T>(value);
  }
};

// store(i, values, lanes) of the values first + i <= .. < first + i + lanes, for all i < count.
template <class T, class Store>
inline void for_values(const QuantizedMatrix& W, int64_t first, int64_t count, const Store& store) {
  using V = Vec<float>;
  uint8_t code_room[kCodeRoom];
  float scale_room[kCodeChunk], shift_room[kCodeChunk];
  const bool looks_up = W.codebook && unit_of(W.packing).bits == 4;
  for (int64_t begin = 0; begin < count; begin += kCodeChunk) {
    const int64_t size = at_most(count - begin, kCodeChunk), at = first + begin;
    const uint8_t* codes = codes_at(W, at, size, code_room);
    const int64_t block = at / W.block_size, blocks = (at + size - 1) / W.block_size + 1 - block;
    const float* scales = numbers_at(W.scales, block, blocks, scale_room);
    const float* shifts = W.shift.values ? numbers_at(W.shift, block, blocks, shift_room) : nullptr;
    int64_t i = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = at_most(size, (block + b + 1) * W.block_size - at);
      const float zero_point = W.zero_point ? W.zero_point[block + b] : 0.0f;
      const BlockFormula<T> formula{V::set1(-zero_point), V::set1(scales[b]), V::set1(W.factor),
                                    V::set1(shifts ? shifts[b] : -0.0f), W.rounding};
      const auto each = [&](const auto& values) __attribute__((always_inline)) {
        for (; i < end; i += V::kWidth) {
          const int lanes = static_cast<int>(at_most(end - i, V::kWidth));
          store(begin + i, values(lanes), lanes);
        }
        i = end;
      };
      if (looks_up) {
        Table16 table;
        for (int r = 0; r < Table16::kRegisters; ++r) {
          table.values[r] = formula(V::load(W.codebook + r * V::kWidth));
        }
        each([&](int) { return table.lookup(codes + i); });
      } else if (W.codebook) {
        each([&](int lanes) {
          float raw[V::kWidth] = {};
          for (int l = 0; l < lanes; ++l) raw[l] = W.codebook[codes[i + l]];
          return formula(V::load(raw));
        });
      } else {
        const auto* numbers = reinterpret_cast<const int8_t*>(codes);
        each([&](int lanes) { return formula(load_lanes<float>(numbers + i, lanes)); });
      }
    }
  }
}

template <class Out>
inline void store_values(Out* out, Vec<float>::Reg values, int lanes) {
  if constexpr (std::is_same_v<Out, double>) {
    float room[Vec<float>::kWidth];
    Vec<float>::store(room, values);
    for (int l = 0; l < lanes; ++l) out[l] = room[l];
  } else {
    store_lanes<float>(out, values, lanes);
  }
}

// Values rounded to T, as Out.
template <class T, class Out>
void dequantize(const QuantizedMatrix& W, const QuantizedPart& part, void* out, int64_t ld) {
  for (int64_t i = 0; i < part.rows; ++i) {
    Out* const row = static_cast<Out*>(out) + i * ld;
    for_values<T>(W, (part.row + i) * W.K + part.column, part.columns,
                  [&](int64_t j, Vec<float>::Reg values, int lanes) {
                    store_values(row + j, values, lanes);
                  });
  }
}

// sums[i] += the products of values[count] and row i of x, lane by lane
template <int kRows, class S>
inline void add_products(int64_t count, const S* values, const S* x, int64_t ldx,
                         typename Vec<S>::Reg* sums) {
  using V = Vec<S>;
  typename V::Reg own[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) own[i] = sums[i];
  for (int64_t k = 0; k < count; k += V::kWidth) {
    const int lanes = static_cast<int>(at_most(count - k, V::kWidth));
    const auto w = load_lanes<S>(values + k, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      own[i] = V::fma(w, load_lanes<S>(x + i * ldx + k, lanes), own[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = own[i];
}

template <class T>
void quantized_few_rows(const QuantizedMatrix& W, const FewRowsArgs& args, int64_t begin,
                        int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const auto* const x = static_cast<const S*>(args.x);
  S values[kCodeChunk];
  for (int64_t n = begin; n < end; ++n) {
    typename V::Reg sums[kFewRows];
    for (auto& sum : sums) sum = V::zero();
    for (int64_t k = 0; k < W.K; k += kCodeChunk) {
      const int64_t count = at_most(W.K - k, kCodeChunk);
      for_values<T>(W, n * W.K + k, count, [&](int64_t j, Vec<float>::Reg part, int lanes) {
        store_values(values + j, part, lanes);
      });
      int64_t m = 0;
      for (; m + 8 <= args.M; m += 8) {
        add_products<8>(count, values, x + m * W.K + k, W.K, sums + m);
      }
      for (; m + 4 <= args.M; m += 4) {
        add_products<4>(count, values, x + m * W.K + k, W.K, sums + m);
      }
      for (; m < args.M; ++m) add_products<1>(count, values, x + m * W.K + k, W.K, sums + m);
    }
    for (int64_t m = 0; m < args.M; ++m) {
      T* const y = static_cast<T*>(args.y) + m * args.ldy + n;
      auto sum = V::set1(V::sum(sums[m]));
      if (args.add) sum = V::add(sum, V::load_partial(y, 1));
      V::store_partial(y, sum, 1);
    }
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
