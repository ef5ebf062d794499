// Matrix products of bf16 operands on AMX: tiles of 16 x 32 by 32 x 16 terms, which are multiplied
// exactly and summed in float, each tile's terms apart. Denormal terms count as zero.
//
//   C[i][j] = sum_k A(i,k) B(k,j)     a step is 32 terms k, 16 pairs of neighbours
//
// Every tile is whole: what an operand lacks at its edges is zero, or not stored.
#pragma once

#include "bf16_dot.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

constexpr int64_t kTile = 16;         // rows, and columns of floats or pairs
constexpr int64_t kStep = 2 * kTile;  // terms
constexpr int64_t kTileRowBytes = 4 * kTile;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Whole tiles for this thread, as long as this lives; then what was configured before, which may be
// another library's.
class WholeTiles {
 public:
  WholeTiles() {
    _tile_storeconfig(&before_);
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileRowBytes, config.rows[i] = kTile;
    _tile_loadconfig(&config);
  }
  ~WholeTiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;

 private:
  TileConfig before_;
};

// Rows of bf16, read a step at a time. Of a float operand they are its bf16 and, remainder_bytes
// further on, the bf16 of what that leaves; the remainder of the first `exact` steps is read.
// `folded` rows have both in their single step, half of it each.
struct TileRows {
  const char* data;
  int64_t row_bytes;
  bool padded = false;  // whole tiles may be read: with zeros after the last term
  int64_t remainder_bytes = 0, exact = 0;
  bool folded = false;
  bool cold = false;  // rows come from memory: those of the next panel are prefetched
};

// One tile in memory, for what does not lie as AMX reads it. The compiler does not know that tile
// instructions read and write memory, which the barriers tell it.
struct alignas(64) TileBuffer {
  uint32_t words[kTile][kTile];

  __m512i* row(int64_t i) { return reinterpret_cast<__m512i*>(words[i]); }
};
[[gnu::always_inline]] inline void memory_barrier() { asm volatile("" ::: "memory"); }

struct TileAddress {
  const void* data;
  int64_t stride;  // bytes
};

// Rows [row, row + 16) of A, terms [k, k + 32).
inline TileAddress left_tile(const TileRows& a, int64_t row, int64_t rows, int64_t k, int64_t K,
                             TileBuffer& buffer) {
  const char* p = a.data + row * a.row_bytes + 2 * k;
  if (a.padded || (row + kTile <= rows && k + kStep <= K)) return {p, a.row_bytes};
  const int64_t terms = K - k;
  const __mmask32 mask = terms >= kStep ? ~0u : (1u << terms) - 1u;
  for (int64_t i = 0; i < kTile; ++i) {
    _mm512_store_si512(buffer.row(i), row + i < rows
                                          ? _mm512_maskz_loadu_epi16(mask, p + i * a.row_bytes)
                                          : _mm512_setzero_si512());
  }
  return {&buffer, kTileRowBytes};
}

// Terms [k, k + 32) of B, columns [column, column + 16); folded, its at most 16 terms twice.
inline TileAddress right_tile(const RowPairs& b, int64_t k, int64_t K, int64_t column,
                              __mmask16 lanes, bool folded, TileBuffer& buffer) {
  const int64_t pairs = K / 2, first = k / 2, end = folded ? kTile / 2 : kTile;
  for (int64_t i = 0; i < end; ++i) {
    __m512i words = _mm512_setzero_si512();
    if (first + i < pairs) {
      words = (__m512i)b.pair(first + i, column, lanes);
    } else if (2 * (first + i) < K) {
      words = (__m512i)b.single(first + i, column, lanes);
    }
    _mm512_store_si512(buffer.row(i), words);
    if (folded) _mm512_store_si512(buffer.row(end + i), words);
  }
  return {&buffer, kTileRowBytes};
}
inline TileAddress right_tile(const PackedPairs& b, int64_t k, int64_t K, int64_t column,
                              __mmask16 lanes, bool folded, TileBuffer& buffer) {
  const uint32_t* p = b.data + k / 2 * b.stride + column;
  const int64_t pairs = (K + 1) / 2 - k / 2, end = folded ? kTile / 2 : kTile;
  if (!folded && pairs >= kTile && lanes == 0xFFFF) return {p, 4 * b.stride};
  for (int64_t i = 0; i < end; ++i) {
    const __m512i words =
        i < pairs ? _mm512_maskz_loadu_epi32(lanes, p + i * b.stride) : _mm512_setzero_si512();
    _mm512_store_si512(buffer.row(i), words);
    if (folded) _mm512_store_si512(buffer.row(end + i), words);
  }
  return {&buffer, kTileRowBytes};
}

// The numbers of tiles must be literals.
#define LORA_EXT_LOAD_TILE(tile, address)      \
  do {                                         \
    const TileAddress from = address;          \
    memory_barrier();                          \
    _tile_loadd(tile, from.data, from.stride); \
    memory_barrier();                          \
  } while (false)
#define LORA_EXT_ADD_TILE(sums, right, address) \
  do {                                          \
    LORA_EXT_LOAD_TILE(6, address);             \
    _tile_dpbf16ps(sums, 6, right);             \
  } while (false)
#define LORA_EXT_STORE_TILE(sums) _tile_stored(sums, &results[sums], kTileRowBytes)

template <class Store>
inline void store_tile(const TileBuffer& tile, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, const Store& store) {
  const int lanes = static_cast<int>(at_most(columns - column, kTile));
  for (int64_t i = 0; i < kTile && row + i < rows && lanes > 0; ++i) {
    store(row + i, column, _mm512_load_ps(tile.words[i]), lanes);
  }
}

// Rows from `row` on, up to 96, and 16 columns: for products of few columns.
template <class B, class Store>
inline void tall_block(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t K,
                       const TileRows& a, const B& b, const Store& store) {
  TileBuffer left, right, results[6];
  const __mmask16 lanes = first_lanes(columns - column);
  const int64_t tiles = (rows - row + kTile - 1) / kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t k = 0; k < K; k += kStep) {
    LORA_EXT_LOAD_TILE(7, right_tile(b, k, K, column, lanes, a.folded, right));
    for (int remainder = 0; remainder <= (k / kStep < a.exact ? 1 : 0); ++remainder) {
      TileRows part = a;
      part.data += remainder * a.remainder_bytes;
      const auto at = [&](int64_t tile) __attribute__((always_inline)) {
        return left_tile(part, row + tile * kTile, rows, k, K, left);
      };
      if (a.cold) {
        for (int64_t i = 0; i < tiles * kTile; ++i) {
          prefetch(a.data + (row + 6 * kTile + i) * a.row_bytes + 2 * k);
        }
      }
      LORA_EXT_ADD_TILE(0, 7, at(0));
      if (tiles > 1) LORA_EXT_ADD_TILE(1, 7, at(1));
      if (tiles > 2) LORA_EXT_ADD_TILE(2, 7, at(2));
      if (tiles > 3) LORA_EXT_ADD_TILE(3, 7, at(3));
      if (tiles > 4) LORA_EXT_ADD_TILE(4, 7, at(4));
      if (tiles > 5) LORA_EXT_ADD_TILE(5, 7, at(5));
    }
  }
  memory_barrier();
  LORA_EXT_STORE_TILE(0);
  if (tiles > 1) LORA_EXT_STORE_TILE(1);
  if (tiles > 2) LORA_EXT_STORE_TILE(2);
  if (tiles > 3) LORA_EXT_STORE_TILE(3);
  if (tiles > 4) LORA_EXT_STORE_TILE(4);
  if (tiles > 5) LORA_EXT_STORE_TILE(5);
  memory_barrier();
  for (int64_t i = 0; i < at_most(tiles, 6); ++i) {
    store_tile(results[i], row + i * kTile, rows, column, columns, store);
  }
}

// Terms [k, k + 32) of B, up to 32 columns, into tiles 4 and 5.
template <class B>
inline void load_right(const B& b, int64_t k, int64_t K, int64_t column, int64_t columns,
                       bool folded) {
  TileBuffer first, second;
  LORA_EXT_LOAD_TILE(4, right_tile(b, k, K, column, first_lanes(columns - column), folded, first));
  column += kTile;
  if (column >= columns) return;
  LORA_EXT_LOAD_TILE(5, right_tile(b, k, K, column, first_lanes(columns - column), folded, second));
}

// Up to 32 rows and 32 columns, a cache line of bf16. `loaded`: B is one step, and in its tiles.
template <class B, class Store>
inline void square_block(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t K,
                         const TileRows& a, const B& b, bool loaded, const Store& store) {
  TileBuffer left, results[4];
  const bool two_rows = row + kTile < rows, two_columns = column + kTile < columns;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < K; k += kStep) {
    if (!loaded) load_right(b, k, K, column, columns, a.folded);
    for (int remainder = 0; remainder <= (k / kStep < a.exact ? 1 : 0); ++remainder) {
      TileRows part = a;
      part.data += remainder * a.remainder_bytes;
      LORA_EXT_ADD_TILE(0, 4, left_tile(part, row, rows, k, K, left));
      if (two_columns) _tile_dpbf16ps(1, 6, 5);
      if (two_rows) {
        LORA_EXT_ADD_TILE(2, 4, left_tile(part, row + kTile, rows, k, K, left));
        if (two_columns) _tile_dpbf16ps(3, 6, 5);
      }
    }
  }
  memory_barrier();
  LORA_EXT_STORE_TILE(0);
  LORA_EXT_STORE_TILE(1);
  LORA_EXT_STORE_TILE(2);
  LORA_EXT_STORE_TILE(3);
  memory_barrier();
  for (int64_t i = 0; i < 4; ++i) {
    store_tile(results[i], row + i / 2 * kTile, rows, column + i % 2 * kTile, columns, store);
  }
}

// store(i, j, sums, lanes) receives C[i][j .. j + lanes). Of this thread's WholeTiles.
template <class B, class Store>
inline void amx_gemm(int64_t rows, int64_t columns, int64_t K, const TileRows& a, const B& b,
                     const Store& store) {
  if (columns <= kTile) {
    for (int64_t i = 0; i < rows; i += 6 * kTile) tall_block(i, rows, 0, columns, K, a, b, store);
    return;
  }
  for (int64_t i = 0; i < rows; i += 2 * kTile) {
    if (K > kStep) {
      for (int64_t j = 0; j < columns; j += 2 * kTile) {
        square_block(i, rows, j, columns, K, a, b, false, store);
      }
      continue;
    }
    // One step: a block takes no longer than what it reads of B would wait for having been written,
    // so that is made one block ahead.
    TileBuffer buffers[2][2];
    TileAddress ahead[2][2];
    const auto make = [&](int64_t j, int64_t at) {
      for (int64_t half = 0; half < 2; ++half, j += kTile) {
        if (j >= columns) return;
        ahead[at][half] =
            right_tile(b, 0, K, j, first_lanes(columns - j), a.folded, buffers[at][half]);
      }
    };
    make(0, 0);
    int64_t at = 0;
    for (int64_t j = 0; j < columns; j += 2 * kTile, at = 1 - at) {
      make(j + 2 * kTile, 1 - at);
      LORA_EXT_LOAD_TILE(4, ahead[at][0]);
      if (j + kTile < columns) LORA_EXT_LOAD_TILE(5, ahead[at][1]);
      square_block(i, rows, j, columns, K, a, b, true, store);
    }
  }
}
#undef LORA_EXT_LOAD_TILE
#undef LORA_EXT_ADD_TILE
#undef LORA_EXT_STORE_TILE

}  // namespace lora_ext::LORA_EXT_ISA
