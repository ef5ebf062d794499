// For tests/cpu_kernels.cpp: memory of exactly the size that is asked for, random numbers and whole
// ones of every type in it, and what is exact of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

// Elements of a storage or compute type; null if there are none, as torch's are.
struct Buffer {
  int64_t size;  // of an element
  int64_t count;
  std::unique_ptr<unsigned char[]> bytes;

  Buffer(int64_t element_size, int64_t elements) : size(element_size), count(elements) {
    if (count <= 0) return;
    bytes.reset(new unsigned char[size * count]);
    std::memset(data(), 0xFF, size * count);  // a NaN in every type
  }
  unsigned char* data() const { return bytes.get(); }
  void* at(int64_t element) const { return data() ? data() + element * size : nullptr; }
};

uint64_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

// A storage type by its size and the top bits of numbers from 1 to 2.
struct Type {
  int64_t size;
  int fraction_bits;
  uint64_t one;
};
constexpr Type kF64{8, 52, 0x3FF0000000000000u}, kF32{4, 23, 0x3F800000u}, kBF16{2, 7, 0x3F80u},
    kF16{2, 10, 0x3C00u};
struct Pair {
  const char* name;
  Type base, adapter, compute;
};
constexpr Pair kPairs[] = {{"f64", kF64, kF64, kF64},    {"f32", kF32, kF32, kF32},
                           {"bf16", kBF16, kBF16, kF32}, {"bf16_f32", kBF16, kF32, kF32},
                           {"f16", kF16, kF16, kF32},    {"f16_f32", kF16, kF32, kF32}};

Buffer empty(const Type& type, int64_t count) { return Buffer(type.size, count); }

Buffer random(const Type& type, int64_t count) {
  Buffer buffer(type.size, count);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t sign = (random_bits() & 1u) << (8 * type.size - 1);
    const uint64_t bits =
        type.one | sign | (random_bits() & ((uint64_t{1} << type.fraction_bits) - 1));
    std::memcpy(buffer.at(i), &bits, type.size);  // little endian
  }
  return buffer;
}

// Whole numbers up to `most`, a power of 2 less 1.
Buffer integers(const Type& type, int64_t count, int64_t most = 1) {
  Buffer buffer(type.size, count);
  const uint64_t bias = type.one >> type.fraction_bits;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<int64_t>(random_bits() % (2 * most + 1)) - most;
    uint64_t bits = 0;
    if (value != 0) {
      const int exponent = std::ilogb(value);
      const double fraction = std::ldexp(std::abs(value), -exponent) - 1.0;
      bits = (bias + exponent) << type.fraction_bits |
             static_cast<uint64_t>(std::ldexp(fraction, type.fraction_bits)) |
             static_cast<uint64_t>(value < 0) << (8 * type.size - 1);
    }
    std::memcpy(buffer.at(i), &bits, type.size);  // little endian
  }
  return buffer;
}

// What the kernels are compared with is optimised, and not watched: it is not what is tested.
#define LORA_EXT_REFERENCE __attribute__((optimize("O2"), no_sanitize("address", "undefined")))

LORA_EXT_REFERENCE double value_of(const Type& type, const Buffer& buffer, int64_t i) {
  uint64_t bits = 0;
  std::memcpy(&bits, buffer.bytes.get() + i * type.size, type.size);
  const int exponent_bits = static_cast<int>(8 * type.size) - 1 - type.fraction_bits;
  const uint64_t bias = (uint64_t{1} << (exponent_bits - 1)) - 1;
  const uint64_t fraction = bits & ((uint64_t{1} << type.fraction_bits) - 1);
  const uint64_t exponent = bits >> type.fraction_bits & (2 * bias + 1);
  const uint64_t sign = bits >> (8 * type.size - 1);
  if (exponent == 2 * bias + 1) return NAN;
  if (exponent == 0) {  // zero or denormal
    const double size = fraction * std::ldexp(1.0, 1 - static_cast<int>(bias) - type.fraction_bits);
    return sign ? -size : size;
  }
  const uint64_t wide =
      sign << 63 | (exponent - bias + 1023) << 52 | fraction << (52 - type.fraction_bits);
  double value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Ties to even. Nothing here is denormal, or too large.
LORA_EXT_REFERENCE double rounded(const Type& type, double exact) {
  const int dropped = 52 - type.fraction_bits;
  if (dropped == 0) return exact;
  uint64_t bits;
  std::memcpy(&bits, &exact, sizeof(bits));
  bits += (uint64_t{1} << (dropped - 1)) - 1 + (bits >> dropped & 1u);
  bits &= ~((uint64_t{1} << dropped) - 1);
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void expect(const char* what, const Type& type, const Buffer& buffer,
            const std::vector<double>& exact) {
  for (int64_t i = 0; i < buffer.count; ++i) {
    const double got = value_of(type, buffer, i), expected = rounded(type, exact[i]);
    if (got != expected) {
      std::printf("%s: element %lld is %g, not %g\n", what, static_cast<long long>(i), got,
                  expected);
      std::exit(1);
    }
  }
}

std::vector<double> values_of(const Type& type, const Buffer& buffer, int64_t stride, int64_t rows,
                              int64_t columns) {
  std::vector<double> values(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    values[i] = value_of(type, buffer, i / columns * stride + i % columns);
  }
  return values;
}

// factor * a b of [rows, n] and [n, columns], each with steps between its rows and its columns
struct View {
  const std::vector<double>& values;
  int64_t row, column;
};
LORA_EXT_REFERENCE std::vector<double> times(double factor, View a, View b, int64_t rows, int64_t n,
                                             int64_t columns) {
  std::vector<double> result(rows * columns);
  const double *left = a.values.data(), *right = b.values.data();
  double* out = result.data();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double by = factor * left[i * a.row + k * a.column];
      for (int64_t j = 0; j < columns; ++j) {
        out[i * columns + j] += by * right[k * b.row + j * b.column];
      }
    }
  }
  return result;
}

void expect_finite(const char* what, const Type& type, const Buffer& buffer) {
  const uint64_t sign = uint64_t{1} << (8 * type.size - 1);
  const uint64_t exponent = sign - (uint64_t{1} << type.fraction_bits);
  for (int64_t i = 0; i < buffer.count; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, buffer.at(i), type.size);
    if ((bits & exponent) == exponent) {
      std::printf("%s: element %lld was not written\n", what, static_cast<long long>(i));
      std::exit(1);
    }
  }
}

}  // namespace
