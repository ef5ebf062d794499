// Products with the elements of x that dropout drops, x_d: x_d W^T, and the places of w W where x
// was dropped. A fraction p of the multiplications of a dense product.
//
// Both walk a panel of W^T, [kDropoutBlock columns of x, kPanelWidth outputs] in the compute type,
// which stays in the L1 cache while all rows pass.
#pragma once

#include "../dora_linear_kernels.h"
#include "rows.h"
#include "transpose.h"

namespace lora_ext::LORA_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // of 32 registers; the panel takes the cache first
#else
constexpr int kPanelVectors = 8;  // of 16
#endif
template <class S>
constexpr int kPanelWidth = kPanelVectors * Vec<S>::kWidth;

// A list is filled up to whole groups with a column of its own, which reads a row of zeros.
constexpr int64_t kDroppedGroup = 4;
constexpr uint8_t kNoColumn = kDropoutBlock;

// A panel's few columns of one row after the other are no stream that the CPU would foresee.
constexpr int64_t kRowsAhead = 8;

template <class S>
constexpr int64_t kPanelElements = (kDropoutBlock + 1) * kPanelWidth<S>;

// counts[block * rows + i]: how long the list of row first + i is, for rows i in [begin, end);
// keep [rows, keep_words(K)]: what dropout keeps.
inline void count_dropped(const DropoutArgs& dropout, int64_t K, int64_t first, int64_t rows,
                          int64_t begin, int64_t end, uint16_t* keep, int32_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    uint16_t* words = keep + i * keep_words(K);
    fill_keep_bits(dropout.rng, first + i, K, dropout.threshold, words);
    for (int64_t block = 0; block * kDropoutBlock < K; ++block) {
      int64_t kept = 0;
      const int64_t width = at_most(K - block * kDropoutBlock, kDropoutBlock);
      for (int slot = 0; slot < kDropoutSlots; ++slot) {
        uint16_t& word = words[block * kDropoutSlots + slot];
        const int64_t beyond = width - slot * kDropoutLanes;  // columns that x does not have
        if (beyond < kDropoutLanes) word |= beyond <= 0 ? 0xFFFFu : 0xFFFFu << beyond;
        kept += __builtin_popcount(word);
      }
      const int64_t dropped = kDropoutBlock - kept;
      counts[block * rows + i] =
          static_cast<int32_t>((dropped + kDroppedGroup - 1) / kDroppedGroup * kDroppedGroup);
    }
  }
}

// The lists themselves; values, the elements of x there, only if x is given.
template <class T>
void list_dropped(const void* x, int64_t ldx, int64_t K, int64_t first, int64_t rows, int64_t begin,
                  int64_t end, const uint16_t* keep, const int32_t* starts, uint8_t* columns,
                  void* values) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = x ? static_cast<const T*>(x) + (first + i) * ldx : nullptr;
    const uint16_t* words = keep + i * keep_words(K);
    for (int64_t block = 0; block * kDropoutBlock < K; ++block) {
      int32_t e = starts[block * rows + i];
      S widened[kDropoutBlock];
      const int64_t width = at_most(K - block * kDropoutBlock, kDropoutBlock);
      for (int64_t j = 0; row && j < width; j += V::kWidth) {
        const int lanes = static_cast<int>(at_most(width - j, V::kWidth));
        V::store(widened + j, load_lanes<S>(row + block * kDropoutBlock + j, lanes));
      }
      for (int slot = 0; slot < kDropoutSlots; slot += 4) {  // 64 columns at a time
        uint64_t dropped = 0;
        for (int i = 0; i < 4; ++i) {
          const auto kept = static_cast<uint64_t>(words[block * kDropoutSlots + slot + i]);
          dropped |= (kept ^ 0xFFFFu) << (i * kDropoutLanes);
        }
        for (; dropped; dropped &= dropped - 1, ++e) {
          const int column = slot * kDropoutLanes + __builtin_ctzll(dropped);
          columns[e] = static_cast<uint8_t>(column);
          if (row) static_cast<S*>(values)[e] = widened[column];
        }
      }
      for (; e < starts[block * rows + i + 1]; ++e) {
        columns[e] = kNoColumn;
        if (row) static_cast<S*>(values)[e] = S{0};
      }
    }
  }
}

// panel[k][n] = weight[n0 + n][k0 + k], zero beyond the weight; the last row is zero.
template <class T>
void pack_panel(const StridedWeight& weight, int64_t n0, int64_t k0, compute_t<T>* panel) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t kWidth = kPanelWidth<S>;
  const T* data = static_cast<const T*>(weight.data) + n0 * weight.row + k0 * weight.column;
  const int64_t height = at_most(weight.K - k0, kDropoutBlock);
  const int64_t width = at_most(weight.N - n0, kWidth);
  if (width < kWidth) memset(panel, 0, height * kWidth * sizeof(S));
  memset(panel + kNoColumn * kWidth, 0, kWidth * sizeof(S));
  if (weight.column == 1) {
    transpose_rows<S>(
        0, width, height,
        [&](int64_t n, int64_t k, int lanes) {
          return load_lanes<S>(data + n * weight.row + k, lanes);
        },
        [&](int64_t k, int64_t n, int lanes, typename V::Reg values) {
          store_lanes<S>(panel + k * kWidth + n, values, lanes);
        });
    return;
  }
  for (int64_t k = 0; k < height; ++k) {
    for (int64_t n = 0; n < width; n += V::kWidth) {
      const int lanes = static_cast<int>(at_most(width - n, V::kWidth));
      store_lanes<S>(panel + k * kWidth + n, load_lanes<S>(data + k * weight.column + n, lanes),
                     lanes);
    }
  }
}

// sums[i][n] (+)= the products of the dropped elements of row i in one block of columns, summed by
// themselves: short sums err little.
template <class S>
void add_dropped(const S* panel, const int32_t* starts, const uint8_t* columns, const S* values,
                 int64_t rows, bool first, S* sums) {
  using V = Vec<S>;
  constexpr int64_t kWidth = kPanelWidth<S>;
  for (int64_t i = 0; i < rows; ++i, sums += kWidth) {
    typename V::Reg sum[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) sum[v] = V::zero();
    for (int64_t e = starts[i]; e < starts[i + 1]; e += kDroppedGroup) {
#pragma GCC unroll 4
      for (int64_t g = 0; g < kDroppedGroup; ++g) {
        const S* row = panel + columns[e + g] * kWidth;
        const auto factor = V::set1(values[e + g]);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
          sum[v] = V::fma(factor, V::load(row + v * V::kWidth), sum[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      S* total = sums + v * V::kWidth;
      V::store(total, first ? sum[v] : V::add(V::load(total), sum[v]));
    }
  }
}

// Columns [n0, n0 + kPanelWidth) of the rows of a chunk: with z = x W^T, v = (z - x_d W^T)/(1-p) in
// its place, and y += z + (scale - 1) * v.
template <class T>
void dora_linear_forward(const DoraLinearForwardArgs& args, const DroppedLists& lists,
                         int64_t panel_index, void* scratch) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t kWidth = kPanelWidth<S>;
  auto* panel = static_cast<S*>(scratch);
  S* sums = panel + kPanelElements<S>;
  const int64_t n0 = panel_index * kWidth, K = args.weight.K, N = args.weight.N;
  const int64_t rows = lists.rows;
  for (int64_t block = 0; block * kDropoutBlock < K; ++block) {
    pack_panel<T>(args.weight, n0, block * kDropoutBlock, panel);
    add_dropped(panel, lists.starts + block * rows, lists.columns,
                static_cast<const S*>(lists.values), rows, block == 0, sums);
  }
  const auto* scale = static_cast<const S*>(args.scale_minus_1);
  const auto survivor = V::set1(static_cast<S>(args.survivor)), minus = V::set1(S{-1});
  for (int64_t i = 0; i < rows; ++i, sums += kWidth) {
    T* z = static_cast<T*>(args.z) + (lists.first + i) * N;
    T* y = static_cast<T*>(args.y) + (lists.first + i) * N;
    for (int64_t n = n0; n < n0 + kWidth && n < N; n += V::kWidth) {
      const int lanes = static_cast<int>(at_most(N - n, V::kWidth));
      prefetch(z + n + kRowsAhead * N);
      prefetch(y + n + kRowsAhead * N);
      const auto all = load_lanes<S>(z + n, lanes);
      const auto v = V::mul(survivor, V::fma(minus, V::load(sums + (n - n0)), all));
      const auto sum = V::add(load_lanes<S>(y + n, lanes), all);
      store_lanes<S>(y + n, V::fma(load_lanes<S>(scale + n, lanes), v, sum), lanes);
      store_lanes<S>(z + n, v, lanes);
    }
  }
}

// out[g] += the sum of the lanes of a[g]
template <class S>
inline void add_lane_sums(const typename Vec<S>::Reg* a, S* out) {
  for (int g = 0; g < kDroppedGroup; ++g) out[g] += Vec<S>::sum(a[g]);
}

#if defined(__AVX512F__)
template <>
inline void add_lane_sums<float>(const __m512* a, float* out) {
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  const __m512d low = _mm512_castps_pd(halves(a[0], a[1]));
  const __m512d high = _mm512_castps_pd(halves(a[2], a[3]));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 two =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), one));
}
#endif

// out [rows, kPanelWidth] = columns [n0, n0 + kPanelWidth) of u - dy, zero beyond the last one
template <class T>
void copy_difference(const DoraLinearBackwardArgs& args, int64_t first, int64_t rows, int64_t n0,
                     compute_t<T>* out) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t width = at_most(args.weight.N - n0, kPanelWidth<S>);
  const auto minus = V::set1(S{-1});
  for (int64_t i = 0; i < rows; ++i, out += kPanelWidth<S>) {
    const T* u = static_cast<const T*>(args.u) + (first + i) * args.weight.N + n0;
    const T* dy = static_cast<const T*>(args.dy) + (first + i) * args.lddy + n0;
    for (int64_t n = 0; n < kPanelWidth<S>; n += V::kWidth) {
      const int lanes = n < width ? static_cast<int>(at_most(width - n, V::kWidth)) : 0;
      auto difference = V::zero();
      if (lanes) {
        prefetch(u + n + kRowsAhead * args.weight.N);
        prefetch(dy + n + kRowsAhead * args.lddy);
        difference = V::fma(minus, load_lanes<S>(dy + n, lanes), load_lanes<S>(u + n, lanes));
      }
      V::store(out + n, difference);
    }
  }
}

// sums += the products of rows of `left` with the panel's rows of their dropped columns.
template <class S>
void add_sampled(const S* panel, const S* left, const int32_t* starts, const uint8_t* columns,
                 int64_t rows, S* sums) {
  using V = Vec<S>;
  constexpr int64_t kWidth = kPanelWidth<S>;
  for (int64_t i = 0; i < rows; ++i, left += kWidth) {
    typename V::Reg factor[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) factor[v] = V::load(left + v * V::kWidth);
    for (int64_t e = starts[i]; e < starts[i + 1]; e += kDroppedGroup) {
      typename V::Reg products[kDroppedGroup];
#pragma GCC unroll 4
      for (int64_t g = 0; g < kDroppedGroup; ++g) {
        const S* row = panel + columns[e + g] * kWidth;
        products[g] = V::mul(factor[0], V::load(row));
#pragma GCC unroll 8
        for (int v = 1; v < kPanelVectors; ++v) {
          products[g] = V::fma(factor[v], V::load(row + v * V::kWidth), products[g]);
        }
      }
      add_lane_sums<S>(products, sums + e);
    }
  }
}

// Of the rows of a chunk, blocks [first_block, last_block) of columns: dx -= (u - dy) W where x was
// dropped.
template <class T>
void dora_linear_backward(const DoraLinearBackwardArgs& args, const DroppedLists& lists,
                          int64_t first_block, int64_t last_block, void* scratch) {
  using S = compute_t<T>;
  using V = Vec<S>;
  auto* panel = static_cast<S*>(scratch);
  S* difference = panel + kPanelElements<S>;
  auto* sums = static_cast<S*>(lists.values);
  const int64_t K = args.weight.K, rows = lists.rows;
  const int64_t begin = lists.starts[first_block * rows], end = lists.starts[last_block * rows];
  for (int64_t e = begin; e < end; ++e) sums[e] = S{0};
  for (int64_t n0 = 0; n0 < args.weight.N; n0 += kPanelWidth<S>) {
    copy_difference<T>(args, lists.first, rows, n0, difference);
    for (int64_t block = first_block; block < last_block; ++block) {
      pack_panel<T>(args.weight, n0, block * kDropoutBlock, panel);
      add_sampled(panel, difference, lists.starts + block * rows, lists.columns, rows, sums);
    }
  }
  for (int64_t block = first_block; block < last_block; ++block) {
    const int32_t* starts = lists.starts + block * rows;
    for (int64_t i = 0; i < rows; ++i) {
      T* dx = static_cast<T*>(args.dx) + (lists.first + i) * K + block * kDropoutBlock;
      for (int64_t e = starts[i]; e < starts[i + 1]; ++e) {
        if (lists.columns[e] == kNoColumn) continue;
        T* element = dx + lists.columns[e];
        const auto sum = V::fma(V::set1(S{-1}), V::set1(sums[e]), V::load_partial(element, 1));
        V::store_partial(element, sum, 1);
      }
    }
  }
}

template <class S>
int64_t dora_linear_bytes(int64_t rows) {
  return (kPanelElements<S> + rows * kPanelWidth<S>)*static_cast<int64_t>(sizeof(S));
}

}  // namespace lora_ext::LORA_EXT_ISA
