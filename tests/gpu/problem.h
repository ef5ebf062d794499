// One lora_linear problem in the memory of a GPU, and what comes out of it, computed on the host in
// double. Every array is an allocation of its own size, so that compute-sanitizer sees the first
// byte beyond it, and what kernels write is never written before, so that it sees what is not.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "common/dropout.h"
#include "kernels/merge.h"
#include "memory.h"

namespace gpu_test {

using Doubles = std::vector<double>;

// The arithmetic of element.h is the device's.
inline double widen(float value) { return value; }
inline double widen(lora_ext::Bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
inline double widen(lora_ext::Fp16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const double size = exponent == 31  ? NAN
                      : exponent == 0 ? std::ldexp(mantissa, -24)
                                      : std::ldexp(1024 + mantissa, exponent - 25);
  return value.bits >> 15 ? -size : size;
}

// Of a small multiple of 1/8, which every type holds exactly.
inline void narrow(double value, float& out) { out = static_cast<float>(value); }
inline void narrow(double value, lora_ext::Bf16& out) {
  const auto exact = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &exact, sizeof(bits));
  out.bits = static_cast<uint16_t>(bits >> 16);
}
inline void narrow(double value, lora_ext::Fp16& out) {
  int exponent = 0;
  const double mantissa = std::frexp(std::fabs(value), &exponent);  // 0.5 to 1
  const int bits = value == 0 ? 0 : (exponent + 14) << 10 | (int(mantissa * 2048) & 1023);
  out.bits = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

template <class T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<T> values(count);
  for (T& value : values) narrow((int(generator() % 17) - 8) / 8.0, value);
  return values;
}

template <class T>
Doubles widened(const std::vector<T>& values) {
  Doubles result;
  for (const T& value : values) result.push_back(widen(value));
  return result;
}

template <class T>
Doubles fetched(const T* device, size_t count) {
  std::vector<T> values(count);
  check(cudaMemcpy(values.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return widened(values);
}

// out [rows, columns] += scale * a b, over `depth`; a(i, k) and b(k, j) are elements. Its rows are
// shared by all cores: the GPU waits for this.
template <class A, class B>
void add_product(Doubles& out, int rows, int columns, int depth, double scale, const A& a,
                 const B& b) {
  std::atomic<int> next = 0;
  const auto work = [&] {
    for (int i; (i = next++) < rows;) {
      for (int k = 0; k < depth; ++k) {
        const double factor = scale * a(i, k);
        if (factor == 0.0) continue;
        for (int j = 0; j < columns; ++j) out[size_t(i) * columns + j] += factor * b(k, j);
      }
    }
  };
  const bool large = double(rows) * columns * depth > 1e6;
  std::vector<std::thread> others(large ? std::thread::hardware_concurrency() / 2 : 0);
  for (std::thread& other : others) other = std::thread(work);
  work();
  for (std::thread& other : others) other.join();
}

// Throws where the RMS of the error is beyond `bound` times that of what is expected.
inline void expect_close(const char* name, const Doubles& got, const Doubles& want, double bound) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
  }
  if (!(std::sqrt(error) <= bound * std::sqrt(size))) {  // not so for NaN either
    throw std::runtime_error(std::string(name) + ": error " +
                             std::to_string(std::sqrt(error / size)) + " of its size");
  }
}

}  // namespace gpu_test
