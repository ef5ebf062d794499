// What the kernels of lora_linear_grouped find in the table of a call: adapters, called slots, and
// which rows of which slot a block has. The host lays it out (grouped_table.h).
#pragma once

#include "lora_linear_passes.h"

namespace lora_ext {

template <class T>
struct GroupedSlot {
  Split<T> A;             // [r, K]
  Split<T> B;             // [N, width]
  const void* lora_bias;  // [N], where forward adds it; or null
  bool in_float;          // lora_bias; or of T
  bool wants_dh;
  Gradient<T> dA, dB, dlora_bias;  // without places where they are not wanted
  int64_t hidden;                  // the first element in h, whose rows are r apart
  int64_t operand;                 // and in operands and their parts, whose rows are `padded` apart
  int begin;                       // in `order`
  int r;
  int width;   // r; in backward one more where there is a lora_bias, which is B's last column
  int padded;  // width rounded up to a multiple of 16
  float scaling;
  Dropout dropout;  // enabled where it drops
  float survivor;

  LORA_EXT_DEVICE int64_t operand_at(int place, int rank) const {
    return operand + int64_t{place - begin} * padded + rank;
  }
  // What the update of the row at this place is multiplied by.
  LORA_EXT_DEVICE float strength(const float* factor, int place) const {
    return factor ? rounded_product(scaling, factor[place]) : scaling;
  }
};

template <class T>
LORA_EXT_HOST_DEVICE bool is_wanted(const Gradient<T>& gradient) {
  return gradient.rounded || gradient.full;
}

// Of a block: so many places of `order` from `begin` on, all of one slot, and of its ranks.
struct GroupedWork {
  int slot, begin, rows;
  int first, ranks;
  float* part;  // of a gradient, which others are added to; null: it is all of it
};

// Of a matrix rows x columns, from its element `first` on.
template <class T>
LORA_EXT_DEVICE Split<T> part_of(const Split<T>& matrix, int64_t first, int64_t rows,
                                 int64_t columns) {
  return {{matrix.value.data + first, rows, columns, matrix.value.stride},
          matrix.remainder ? matrix.remainder + first : nullptr};
}

// The rows of an operand [*, padded] that a block has, and its ranks.
template <class T>
LORA_EXT_DEVICE Split<T> operand_of(T* value, T* remainder, const GroupedSlot<T>& slot,
                                    const GroupedWork& work) {
  const int64_t at = slot.operand_at(work.begin, work.first);
  return {{value + at, work.rows, work.ranks, slot.padded}, remainder ? remainder + at : nullptr};
}

// The numbers of a block's rows into shared memory, of whole tiles of 64: those below the last are
// never read.
LORA_EXT_DEVICE const int* list_rows(uint8_t* shared, const int* order, int rows, int thread,
                                     int threads) {
  auto* const list = reinterpret_cast<int*>(shared);
  for (int i = thread; i < (rows + 63) / 64 * 64; i += threads) list[i] = i < rows ? order[i] : 0;
  __syncthreads();
  return list;
}

}  // namespace lora_ext
