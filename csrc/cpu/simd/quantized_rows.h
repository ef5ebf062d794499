// Values of quantized matrices. Of codes of 4 bits a block has sixteen values: these are computed,
// by the formula of quantized_matrix.h, and looked up.
#pragma once

#include <type_traits>

#include "../quantized_kernels.h"
#include "quantized_codes.h"

namespace lora_ext::LORA_EXT_ISA {

// The numbers of one block, and what they make of a code's number. kPlain: there are only scales
// and a factor; else what there is none of is -0, which a sum does not change by. kNumbers: no
// value is NaN but by an operation, which rounding then need not look for.
template <class T, bool kPlain, bool kNumbers = false>
struct BlockFormula {
  using V = Vec<float>;
  V::Reg minus_zero_point, scale, factor, shift;
  bool has_factor;
  QuantFloat rounding;

  BlockFormula(const QuantizedMatrix& W, int64_t block, float scale, const float* shift)
      : minus_zero_point(
            V::set1(!kPlain && W.zero_point ? -static_cast<float>(W.zero_point[block]) : -0.0f)),
        scale(V::set1(scale)),
        factor(V::set1(W.factor)),
        shift(V::set1(!kPlain && shift ? *shift : -0.0f)),
        has_factor(W.factor != 1.0f),
        rounding(W.rounding) {}

  V::Reg operator()(V::Reg value) const {
    if constexpr (!kPlain) value = V::add(value, minus_zero_point);
    value = V::mul(value, scale);
    if (has_factor) value = V::mul(value, factor);
    if constexpr (!kPlain) value = V::add(apart(value), shift);
    if (rounding == QuantFloat::F16 && !std::is_same_v<T, Half>) value = V::through(value, Half{});
    if (rounding == QuantFloat::BF16 && !std::is_same_v<T, BFloat16>) {
      value = V::through(value, BFloat16{});
    }
    if constexpr (kNumbers) return V::through_number(value, T{});
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

// Where a value lies among blocks.
struct BlockPlace {
  int64_t block, within;

  BlockPlace(const QuantizedMatrix& W, int64_t value)
      : block(value / W.block_size), within(value % W.block_size) {}
};

// store(i, values, lanes) of the values first + i <= .. < first + i + lanes, for all i < count.
template <class T, bool kPlain, class Store>
inline void for_values(const QuantizedMatrix& W, int64_t first, BlockPlace place, int64_t count,
                       const Store store) {
  using V = Vec<float>;
  uint8_t code_room[kCodeRoom];
  float scale_room[kCodeChunk], shift_room[kCodeChunk];
  const bool by_table = looks_up(W);
  const Table16 codebook = by_table ? codebook_of(W) : Table16{};
  for (int64_t begin = 0; begin < count; begin += kCodeChunk) {
    const int64_t size = at_most(count - begin, kCodeChunk);
    const uint8_t* codes = codes_at(W, first + begin, size, code_room);
    // No more blocks than values: so many numbers are made at most.
    const int64_t left = size - (W.block_size - place.within);
    const int64_t blocks = left <= 0 ? 1 : 1 + (left - 1) / W.block_size + 1;
    const float* scales = numbers_at(W.scales, place.block, blocks, scale_room);
    const float* shifts =
        W.shift.values ? numbers_at(W.shift, place.block, blocks, shift_room) : nullptr;
    int64_t i = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = at_most(size, i + W.block_size - place.within);
      const BlockFormula<T, kPlain> formula(W, place.block + b, scales[b],
                                            shifts ? shifts + b : nullptr);
      place.within += end - i;
      const auto each = [&](const auto& values) __attribute__((always_inline)) {
        for (; i + V::kWidth <= end; i += V::kWidth) {
          store(begin + i, values(V::kWidth), V::kWidth);
        }
        if (i < end) store(begin + i, values(static_cast<int>(end - i)), static_cast<int>(end - i));
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
      if (place.within == W.block_size && b + 1 < blocks) place.within = 0;
    }
    place.block += blocks - 1;
    if (place.within == W.block_size) ++place.block, place.within = 0;
  }
}

template <class T, class Store>
inline void for_values(const QuantizedMatrix& W, int64_t first, int64_t count, const Store& store) {
  if (is_plain(W)) {
    for_values<T, true>(W, first, BlockPlace(W, first), count, store);
  } else {
    for_values<T, false>(W, first, BlockPlace(W, first), count, store);
  }
}

template <class Out>
inline void store_values(Out* out, Vec<float>::Reg values, int lanes) {
  if constexpr (std::is_same_v<Out, double>) {
    float room[Vec<float>::kWidth];
    Vec<float>::store(room, values);
    for (int l = 0; l < lanes; ++l) out[l] = room[l];
  } else {
    lanes == Vec<float>::kWidth ? Vec<float>::store_exact(out, values)
                                : Vec<float>::store_partial(out, values, lanes);
  }
}

// Values rounded to T, as Out.
template <class T, bool kPlain, class Out>
void dequantize_part(const QuantizedMatrix& W, const QuantizedPart& part, Out* out, int64_t ld) {
  int64_t first = part.row * W.K + part.column;
  BlockPlace place(W, first);
  const BlockPlace row(W, W.K);  // how far a row takes us
  for (int64_t i = 0; i < part.rows; ++i, out += ld) {
    for_values<T, kPlain>(W, first, place, part.columns,
                          [out](int64_t j, Vec<float>::Reg values, int lanes) {
                            store_values(out + j, values, lanes);
                          });
    first += W.K, place.block += row.block, place.within += row.within;
    if (place.within >= W.block_size) ++place.block, place.within -= W.block_size;
  }
}

template <class T, class Out>
void dequantize(const QuantizedMatrix& W, const QuantizedPart& part, void* out, int64_t ld) {
  const auto run = is_plain(W) ? dequantize_part<T, true, Out> : dequantize_part<T, false, Out>;
  run(W, part, static_cast<Out*>(out), ld);
}

}  // namespace lora_ext::LORA_EXT_ISA
