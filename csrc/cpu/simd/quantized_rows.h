// Values of quantized matrices. Of codes of 4 bits a block has sixteen values: these are computed,
// by the formula of quantized_matrix.h, and looked up.
#pragma once

#include <type_traits>

#include "../quantized_kernels.h"
#include "quantized_codes.h"

namespace lora_ext::LORA_EXT_ISA {

// The numbers of one block, and what they make of a code's number. kPlain: there are only scales
// and a factor. Else what there is none of is -0, which a sum does not change by.
template <class T, bool kPlain>
struct BlockFormula {
  using V = Vec<float>;
  V::Reg minus_zero_point, scale, factor, shift;
  QuantFloat rounding;

  BlockFormula(const QuantizedMatrix& W, int64_t block, float scale, const float* shift)
      : minus_zero_point(
            V::set1(!kPlain && W.zero_point ? -static_cast<float>(W.zero_point[block]) : -0.0f)),
        scale(V::set1(scale)),
        factor(V::set1(W.factor)),
        shift(V::set1(!kPlain && shift ? *shift : -0.0f)),
        rounding(W.rounding) {}

  V::Reg operator()(V::Reg value) const {
    if constexpr (!kPlain) value = V::add(value, minus_zero_point);
    value = V::mul(V::mul(value, scale), factor);
    if constexpr (!kPlain) value = V::add(apart(value), shift);
    if (rounding == QuantFloat::F16) value = V::through(value, Half{});
    if (rounding == QuantFloat::BF16) value = V::through(value, BFloat16{});
    return V::through(value, T{});
  }
};

inline bool is_plain(const QuantizedMatrix& W) { return !W.zero_point && !W.shift.values; }
inline bool looks_up(const QuantizedMatrix& W) {
  return W.codebook && unit_of(W.packing).bits == 4;
}

inline Table16 codebook_of(const QuantizedMatrix& W) {
  Table16 table;
  for (int r = 0; r < Table16::kRegisters; ++r) {
    table.values[r] = Vec<float>::load(W.codebook + r * Vec<float>::kWidth);
  }
  return table;
}

// The sixteen values of a block.
template <class Formula>
inline Table16 values_of(const Table16& codebook, const Formula& formula) {
  Table16 table;
  for (int r = 0; r < Table16::kRegisters; ++r) table.values[r] = formula(codebook.values[r]);
  return table;
}

// store(i, values, lanes) of the values first + i <= .. < first + i + lanes, for all i < count.
template <class T, bool kPlain, class Store>
inline void for_values(const QuantizedMatrix& W, int64_t first, int64_t count, const Store& store) {
  using V = Vec<float>;
  uint8_t code_room[kCodeRoom];
  float scale_room[kCodeChunk], shift_room[kCodeChunk];
  const bool by_table = looks_up(W);
  const Table16 codebook = by_table ? codebook_of(W) : Table16{};
  for (int64_t begin = 0; begin < count; begin += kCodeChunk) {
    const int64_t size = at_most(count - begin, kCodeChunk), at = first + begin;
    const uint8_t* codes = codes_at(W, at, size, code_room);
    const int64_t block = at / W.block_size, blocks = (at + size - 1) / W.block_size + 1 - block;
    const float* scales = numbers_at(W.scales, block, blocks, scale_room);
    const float* shifts = W.shift.values ? numbers_at(W.shift, block, blocks, shift_room) : nullptr;
    int64_t i = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = at_most(size, (block + b + 1) * W.block_size - at);
      const BlockFormula<T, kPlain> formula(W, block + b, scales[b], shifts ? shifts + b : nullptr);
      const auto each = [&](const auto& values) __attribute__((always_inline)) {
        for (; i < end; i += V::kWidth) {
          const int lanes = static_cast<int>(at_most(end - i, V::kWidth));
          store(begin + i, values(lanes), lanes);
        }
        i = end;
      };
      if (by_table) {
        const Table16 table = values_of(codebook, formula);
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

template <class T, class Store>
inline void for_values(const QuantizedMatrix& W, int64_t first, int64_t count, const Store& store) {
  if (is_plain(W)) {
    for_values<T, true>(W, first, count, store);
  } else {
    for_values<T, false>(W, first, count, store);
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

}  // namespace lora_ext::LORA_EXT_ISA
