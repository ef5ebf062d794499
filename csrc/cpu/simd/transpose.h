// Transposes of small matrices: of the adapters once per call, and of the sums of lora_B's
// gradient.
#pragma once

#include "rows.h"
#include "vec.h"

namespace lora_ext::LORA_EXT_ISA {

// block[i][j] and block[j][i] change places.
template <class S>
inline void transpose_block(typename Vec<S>::Reg* block) {
  constexpr int kWidth = Vec<S>::kWidth;
  S rows[kWidth][kWidth], columns[kWidth][kWidth];
  for (int i = 0; i < kWidth; ++i) Vec<S>::store(rows[i], block[i]);
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) columns[i][j] = rows[j][i];
  }
  for (int i = 0; i < kWidth; ++i) block[i] = Vec<S>::load(columns[i]);
}

#if defined(__AVX512F__)
template <>
inline void transpose_block<float>(__m512* a) {
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  __m512 b[16], c[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // c[4g + l]: lane l of each quarter, of rows 4g .. 4g + 3
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    c[g] = low(b[g], b[g + 2]);
    c[g + 1] = high(b[g], b[g + 2]);
    c[g + 2] = low(b[g + 1], b[g + 3]);
    c[g + 3] = high(b[g + 1], b[g + 3]);
  }
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    const __m512 even_low = _mm512_shuffle_f32x4(c[l], c[4 + l], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(c[l], c[4 + l], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(c[8 + l], c[12 + l], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(c[8 + l], c[12 + l], 0xDD);
    a[l] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    a[4 + l] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    a[8 + l] = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    a[12 + l] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
  }
}
#elif defined(__AVX2__)
template <>
inline void transpose_block<float>(__m256* a) {
  __m256 b[8], c[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  // c[4g + l]: lane l of each half, of rows 4g .. 4g + 3
#pragma GCC unroll 2
  for (int g = 0; g < 8; g += 4) {
    c[g] = _mm256_shuffle_ps(b[g], b[g + 2], 0x44);
    c[g + 1] = _mm256_shuffle_ps(b[g], b[g + 2], 0xEE);
    c[g + 2] = _mm256_shuffle_ps(b[g + 1], b[g + 3], 0x44);
    c[g + 3] = _mm256_shuffle_ps(b[g + 1], b[g + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    a[l] = _mm256_permute2f128_ps(c[l], c[4 + l], 0x20);
    a[4 + l] = _mm256_permute2f128_ps(c[l], c[4 + l], 0x31);
  }
}

template <>
inline void transpose_block<double>(__m256d* a) {
  const __m256d even_low = _mm256_unpacklo_pd(a[0], a[1]), odd_low = _mm256_unpackhi_pd(a[0], a[1]);
  const __m256d even_high = _mm256_unpacklo_pd(a[2], a[3]);
  const __m256d odd_high = _mm256_unpackhi_pd(a[2], a[3]);
  a[0] = _mm256_permute2f128_pd(even_low, even_high, 0x20);
  a[1] = _mm256_permute2f128_pd(odd_low, odd_high, 0x20);
  a[2] = _mm256_permute2f128_pd(even_low, even_high, 0x31);
  a[3] = _mm256_permute2f128_pd(odd_low, odd_high, 0x31);
}
#endif

// In lane i the sum of block[i]'s lanes, which are added up in pairs. The block is overwritten.
template <class S>
inline typename Vec<S>::Reg sums_of_block(typename Vec<S>::Reg* block) {
  transpose_block<S>(block);
  for (int count = Vec<S>::kWidth / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) block[i] = Vec<S>::add(block[i], block[i + count]);
  }
  return block[0];
}

#if defined(__AVX512F__)
// Half as many vectors each time: in each the sums of halves of two, of quarters of four, ...
template <>
inline __m512 sums_of_block<float>(__m512* a) {
  const __m512i quarters =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const __m512i lanes =
      _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 x = a[i], y = a[i + 8];
    a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, x, y), _mm512_shuffle_f32x4(x, y, 0x4E));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 x = a[i], y = a[i + 4];
    a[i] =
        _mm512_add_ps(_mm512_mask_blend_ps(0xF0F0, x, y), _mm512_permutex2var_ps(x, quarters, y));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 x = a[i], y = a[i + 2];
    a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, x, y), _mm512_shuffle_ps(x, y, 0x4E));
  }
  return _mm512_add_ps(_mm512_mask_blend_ps(0xAAAA, a[0], a[1]),
                       _mm512_permutex2var_ps(a[0], lanes, a[1]));
}
#elif defined(__AVX2__)
template <>
inline __m256 sums_of_block<float>(__m256* a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 x = a[i], y = a[i + 4];
    a[i] = _mm256_add_ps(_mm256_blend_ps(x, y, 0xF0), _mm256_permute2f128_ps(x, y, 0x21));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 x = a[i], y = a[i + 2];
    a[i] = _mm256_add_ps(_mm256_blend_ps(x, y, 0xCC), _mm256_shuffle_ps(x, y, 0x4E));
  }
  const __m256 others = _mm256_permute_ps(_mm256_shuffle_ps(a[0], a[1], 0x8D), 0xD8);
  return _mm256_add_ps(_mm256_blend_ps(a[0], a[1], 0xAA), others);
}
#endif

// Rows [begin, end) of a matrix of `columns` columns become columns [begin, end): blocks of
// load(row, column, height, width), transposed, go to store(row, column, lanes, register).
template <class S, class Load, class Store>
inline void transpose_rows(int64_t begin, int64_t end, int64_t columns, const Load& load,
                           const Store& store) {
  constexpr int kWidth = Vec<S>::kWidth;
  for (int64_t i = begin; i < end; i += kWidth) {
    const int height = static_cast<int>(at_most(end - i, kWidth));
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int width = static_cast<int>(at_most(columns - j, kWidth));
      typename Vec<S>::Reg block[kWidth];
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) {
        block[l] = l < height ? load(i + l, j, width) : Vec<S>::zero();
      }
      transpose_block<S>(block);
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) {
        if (l < width) store(j + l, i, height, block[l]);
      }
    }
  }
}

template <class S>
int64_t transposed_bytes(int64_t rows, int64_t columns) {
  return rows * columns * static_cast<int64_t>(sizeof(S));
}

// Rows [begin, end) of in [rows, columns], transposed: out [columns, rows] in the compute type.
template <class S, class T>
void transpose(const void* in, int64_t rows, int64_t columns, int64_t begin, int64_t end,
               void* out) {
  const auto* data = static_cast<const T*>(in);
  auto* result = static_cast<S*>(out);
  transpose_rows<S>(
      begin, end, columns,
      [&](int64_t i, int64_t j, int lanes) {
        return Vec<S>::load_partial(data + i * columns + j, lanes);
      },
      [&](int64_t j, int64_t i, int lanes, typename Vec<S>::Reg values) {
        Vec<S>::store_partial(result + j * rows + i, values, lanes);
      });
}

// Sums of one gradient, each over a range of rows of x: that of range p begins at data[p * stride].
template <class S>
struct RangeSums {
  const S* data;
  int64_t count, stride;

  typename Vec<S>::Reg sum(int64_t offset, int lanes) const {
    auto total = Vec<S>::load_partial(data + offset, lanes);
    for (int64_t p = 1; p < count; ++p) {
      total = Vec<S>::add(total, Vec<S>::load_partial(data + p * stride + offset, lanes));
    }
    return total;
  }
};

// Rows [begin, end) of out [rows, columns] = factor * the sum over ranges of sums [rows, columns].
template <class S, class T>
void reduce(const void* sums, int64_t count, int64_t stride, double factor, int64_t /*rows*/,
            int64_t columns, int64_t begin, int64_t end, void* out) {
  const RangeSums<S> in{static_cast<const S*>(sums), count, stride};
  const auto factors = Vec<S>::set1(static_cast<S>(factor));
  for (int64_t i = begin * columns; i < end * columns; i += Vec<S>::kWidth) {
    const int lanes = static_cast<int>(at_most(end * columns - i, Vec<S>::kWidth));
    Vec<S>::store_partial(static_cast<T*>(out) + i, Vec<S>::mul(in.sum(i, lanes), factors), lanes);
  }
}

// The same of sums [columns, rows].
template <class S, class T>
void reduce_transposed(const void* sums, int64_t count, int64_t stride, double factor, int64_t rows,
                       int64_t columns, int64_t begin, int64_t end, void* out) {
  const RangeSums<S> in{static_cast<const S*>(sums), count, stride};
  const auto factors = Vec<S>::set1(static_cast<S>(factor));
  auto* result = static_cast<T*>(out);
  for (int64_t i = begin; i < end; i += Vec<S>::kWidth) {
    const int height = static_cast<int>(at_most(end - i, Vec<S>::kWidth));
    transpose_rows<S>(
        0, columns, height,
        [&](int64_t j, int64_t l, int lanes) { return in.sum(j * rows + i + l, lanes); },
        [&](int64_t l, int64_t j, int lanes, typename Vec<S>::Reg values) {
          Vec<S>::store_partial(result + (i + l) * columns + j, Vec<S>::mul(values, factors),
                                lanes);
        });
  }
}

}  // namespace lora_ext::LORA_EXT_ISA
