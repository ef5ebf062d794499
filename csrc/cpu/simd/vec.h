// One vector interface over the instruction sets; the macro LORA_EXT_ISA names the namespace and
// the compiler flags of the translation unit choose the implementation.
//
//   Vec<S>   kWidth lanes of S (float or double)
//     load, store (T*)                T is S, or for float also BFloat16 and Half; load for
//                                     double any of them
//     load_partial, store_partial     the first n lanes, nothing beyond them is touched
//     keep(a, bits)                   lane i survives where bit i is set, else 0
//     all_finite(a)                   no infinity, no NaN
//     load, load_partial (int8_t*)    numbers, for float
//     through(a, T{})                 a rounded to T and widened again, for float
//     through_number(a, T{})          the same, of no NaN but what operations make
//     store_exact(T*, a)              of values that are T's
//     div, clamp(a, low, high)        NaN stays, for float
//     round(a)                        to the nearest integer, for float
//     times_power(a, n)               a 2^n, n an integer from -250 to 250, for float
//   Table16  sixteen floats, kRegisters of Vec<float>
//     lookup(const uint8_t* codes)    those of kWidth codes below 16
//     lookup_both(bytes, low, high)   those of the nibbles of kWidth bytes
//   U32      kWidth lanes of uint32_t, as Philox needs them
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#else
#include "vec_default.h"
#endif
