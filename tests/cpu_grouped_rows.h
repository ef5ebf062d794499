// The kernels of lora_linear as lora_linear_grouped calls them: rows have factors, and what they
// make is added to what is there; of single rows the adapter is read as it lies.
#pragma once

#include "cpu_cases.h"

namespace {

Buffer copy_of(const Buffer& other) {
  Buffer copy(other.size, other.count);
  if (other.count > 0) std::memcpy(copy.data(), other.data(), other.size * other.count);
  return copy;
}

void run_grouped_rows(const Pair& pair, const LoraLinearKernels& kernels,
                      const DropoutKernels& dropout_kernels, const Size& size, bool dropout) {
  const auto [M, N, K, r] = size;
  if (M < 3 || N == 0 || K == 0 || r == 0) return;  // never given to these kernels
  constexpr double kScaling = 0.5;
  const Buffer x = integers(pair.base, M * K), dy = integers(pair.base, M * N);
  const Buffer A = integers(pair.adapter, r * K), B = integers(pair.adapter, N * r);
  const Buffer A_t = pack(kernels, A, r, K), B_t = pack(kernels, B, N, r);
  const Buffer base_y = integers(pair.base, M * N, 7), base_dx = integers(pair.base, M * K, 7);
  const Buffer scratch(1, kernels.scratch_bytes(K, r));
  const Buffer of_single_rows(1, kernels.single_rows_bytes(K, r));
  const DropoutArgs drops = dropout_of(dropout);
  std::vector<double> factors(M), masks(M * K, 1.0);
  for (int64_t m = 0; m < M; ++m) factors[m] = m % 3 == 0 ? 0.5 : m % 3 == 1 ? 1.0 : -2.0;
  if (dropout) {
    const Buffer keep(1, M * K);
    dropout_kernels.mask_rows(drops.rng, drops.threshold, K, 0, M, keep.data());
    for (int64_t i = 0; i < M * K; ++i) masks[i] = 2.0 * keep.data()[i];
  }

  std::vector<double> dropped = values_of(pair.base, x, K, M, K);
  for (int64_t i = 0; i < M * K; ++i) dropped[i] *= masks[i];
  const std::vector<double> a = values_of(pair.adapter, A, K, r, K);
  const std::vector<double> b = values_of(pair.adapter, B, r, N, r);
  const std::vector<double> g = values_of(pair.base, dy, N, M, N);
  const std::vector<double> hidden = times(1.0, {dropped, K, 1}, {a, 1, K}, M, K, r);
  const std::vector<double> dhidden = times(kScaling, {g, N, 1}, {b, r, 1}, M, N, r);
  std::vector<double> strong = hidden, dh = dhidden, dfactors(M);
  for (int64_t i = 0; i < M * r; ++i) {
    strong[i] *= factors[i / r], dh[i] *= factors[i / r];
    dfactors[i / r] += hidden[i] * dhidden[i];
  }
  std::vector<double> exact_y = times(kScaling, {strong, r, 1}, {b, 1, r}, M, r, N);
  for (int64_t i = 0; i < M * N; ++i) exact_y[i] += value_of(pair.base, base_y, i);
  std::vector<double> exact_dx = times(1.0, {dh, r, 1}, {a, K, 1}, M, r, K);
  for (int64_t i = 0; i < M * K; ++i) {
    exact_dx[i] = exact_dx[i] * masks[i] + value_of(pair.base, base_dx, i);
  }

  const Buffer h = empty(pair.compute, M * r);
  for (const bool single : {false, true}) {
    const Buffer y = copy_of(base_y);
    LoraLinearForwardArgs forward{};
    forward.M = M, forward.K = K, forward.N = N, forward.r = r;
    forward.x = x.data(), forward.ldx = K;
    forward.lora_A_t = A_t.data(), forward.lora_B_t = B_t.data();
    forward.lora_A = A.data(), forward.lora_B = B.data();
    forward.scaling = kScaling, forward.dropout = drops, forward.y = y.data(), forward.h = h.data();
    forward.row_factors = factors.data(), forward.add_y = true;
    in_two(M, [&](int, int64_t begin, int64_t end) {
      const auto rows = single ? kernels.single_rows : kernels.forward_rows;
      rows(forward, begin, end, single ? of_single_rows.data() : scratch.data());
    });
    expect(single ? "y of single rows" : "y of rows with factors", pair.base, y, exact_y);
    expect(single ? "h of single rows" : "h of rows with factors", pair.compute, h, hidden);
  }

  const Buffer dx = copy_of(base_dx), dA = empty(pair.adapter, r * K);
  const Buffer dB = empty(pair.adapter, N * r);
  const Buffer sums_A = empty(pair.compute, 2 * r * K), sums_B = empty(pair.compute, 2 * r * N);
  std::vector<double> drow_factors(M);
  LoraLinearBackwardArgs backward{};
  backward.M = M, backward.K = K, backward.N = N, backward.r = r;
  backward.dy = dy.data(), backward.lddy = N, backward.x = x.data(), backward.ldx = K;
  backward.h = h.data(), backward.lora_A = A.data(), backward.lora_B = B.data();
  backward.lora_A_t = A_t.data(), backward.scaling = kScaling, backward.dropout = drops;
  backward.dx = dx.data(), backward.add_dx = true;
  backward.row_factors = factors.data(), backward.drow_factors = drow_factors.data();
  in_two(M, [&](int range, int64_t begin, int64_t end) {
    kernels.backward_rows(backward, begin, end, sums_A.at(range * r * K), sums_B.at(range * r * N),
                          scratch.data());
  });
  expect("dx of rows with factors", pair.base, dx, exact_dx);
  kernels.reduce_a(sums_A.data(), 2, r * K, 1.0, r, K, 0, r, dA.data());
  kernels.reduce_b(sums_B.data(), 2, r * N, kScaling, N, r, 0, N, dB.data());
  expect("dA of rows with factors", pair.adapter, dA,
         times(1.0, {dh, 1, r}, {dropped, K, 1}, r, M, K));
  expect("dB of rows with factors", pair.adapter, dB,
         times(kScaling, {g, 1, N}, {strong, r, 1}, N, M, r));
  for (int64_t m = 0; m < M; ++m) {
    if (drow_factors[m] != dfactors[m]) {
      std::printf("gradient of factor %lld is %g, not %g\n", static_cast<long long>(m),
                  drow_factors[m], dfactors[m]);
      std::exit(1);
    }
  }
}

}  // namespace
