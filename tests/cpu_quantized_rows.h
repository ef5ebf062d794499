// The kernels of quantized matrices, in every packing: what they write of parts of a matrix of
// whole numbers is the same in both types, and few rows times it are exact.
#pragma once

#include "cpu_cases.h"

namespace {

Buffer random_bytes(int64_t count) {
  Buffer buffer(1, count);
  for (int64_t i = 0; i < count; ++i) buffer.data()[i] = static_cast<uint8_t>(random_bits());
  return buffer;
}

void run_quantized(const Pair& pair, const QuantizedKernels& kernels, const Size& size,
                   QuantPacking packing, int64_t block_size, bool plain) {
  const QuantUnit& unit = unit_of(packing);
  const int64_t M = size.M < kFewRows ? size.M : kFewRows, N = size.N;
  const int64_t K = unit.may_split ? size.K : (size.K + unit.codes - 1) / unit.codes * unit.codes;
  if (M == 0 || N * K == 0 || N * K > 1 << 13) return;
  if (block_size == 0) block_size = K;
  const int64_t blocks = (N * K - 1) / block_size + 1;
  const Buffer codes = random_bytes(((N * K - 1) / unit.codes + 1) * unit.bytes);
  const Buffer codebook = integers(kF32, int64_t{1} << unit.bits, 7);
  const Buffer scales = integers(kF32, blocks), half_scales = integers(kF16, (blocks - 1) / 3 + 1);
  const Buffer nested_codes = random_bytes(blocks), nested_codebook = integers(kF32, 256);
  const Buffer shifts = integers(kBF16, blocks), zero_points = Buffer(1, blocks);
  for (int64_t b = 0; b < blocks; ++b) zero_points.data()[b] = b % 3;
  const auto floats = [](const Buffer& buffer) {
    return reinterpret_cast<const float*>(buffer.data());
  };
  QuantizedMatrix W{};
  W.N = N, W.K = K, W.codes = codes.data(), W.packing = packing, W.block_size = block_size;
  W.codebook = packing == QuantPacking::Int8 ? nullptr : floats(codebook);
  W.scales.values = scales.data(), W.factor = 1;
  if (!plain) {
    W.scales = {half_scales.data(),
                QuantFloat::F16,
                nested_codes.data(),
                floats(nested_codebook),
                3,
                true,
                1.0f};
    W.shift.values = shifts.data(), W.shift.type = QuantFloat::BF16;
    W.zero_point = reinterpret_cast<const int8_t*>(zero_points.data());
    W.rounding = QuantFloat::BF16;
  }

  const Buffer wide = empty(pair.compute, N * K);
  kernels.dequantize_wide(W, {0, N, 0, K}, wide.data(), K);
  expect_finite("dequantize_wide", pair.compute, wide);
  const std::vector<double> w = values_of(pair.compute, wide, K, N, K);
  const int64_t row = N / 3, column = K / 3, rows = N - row, columns = K - column;
  const Buffer part = empty(pair.base, rows * columns);
  kernels.dequantize(W, {row, rows, column, columns}, part.data(), columns);
  std::vector<double> exact(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    exact[i] = w[(row + i / columns) * K + column + i % columns];
  }
  expect("dequantize", pair.base, part, exact);

  const Buffer x = integers(pair.base, M * K), y = integers(pair.base, M * N, 7);
  const Buffer packed(1, kernels.few_rows_bytes(W, M));
  exact = times(1.0, {values_of(pair.base, x, K, M, K), K, 1}, {w, 1, K}, M, K, N);
  for (int64_t i = 0; i < M * N; ++i) exact[i] += value_of(pair.base, y, i);
  const FewRowsArgs args{M, x.data(), K, packed.data(), y.data(), N, true};
  kernels.pack_few_rows(W, args);
  in_two(N, [&](int, int64_t begin, int64_t end) { kernels.few_rows(W, args, begin, end); });
  expect("few rows", pair.base, y, exact);
}

void run_quantized(const Pair& pair, const QuantizedKernels& kernels, const Size& size) {
  for (int packing = 0; packing < kQuantPackings; ++packing) {
    for (const int64_t block_size : {0, 64, 7}) {
      for (const bool plain : {true, false}) {
        run_quantized(pair, kernels, size, static_cast<QuantPacking>(packing), block_size, plain);
      }
    }
  }
}

}  // namespace
