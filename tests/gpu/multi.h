// Layers of one x together (kernels/lora_linear_multi.h), against the host in double.
#pragma once

#include "kernels/lora_linear_multi.h"
#include "problem.h"

namespace gpu_test {

// y and h, then dx, dA and dB of three layers: with a bias, with another rank, without adapter.
template <class T, class TA>
void run_multi(lora_ext::KernelFamily family, bool transposed) {
  using namespace lora_ext;
  constexpr int M = 300, K = 136, kLayers = 3;
  constexpr int N[kLayers] = {264, 72, 136}, r[kLayers] = {16, 40, 0};
  const auto count = [](int rows, int columns) { return size_t(rows) * size_t(columns); };
  const auto x = random_values<T>(count(M, K), 1);
  const auto bias = random_values<float>(size_t(N[0]), 2);
  std::vector<T> weight[kLayers], dy[kLayers];
  std::vector<TA> A[kLayers], B[kLayers];
  Memory memory;
  std::vector<ForwardCall<T, TA>> forwards;
  std::vector<BackwardCall<T, TA>> backwards;
  const Matrix<T> x_on_gpu{memory.copy(x), M, K, K};
  T* const dx = memory.fresh<T>(count(M, K));
  for (int i = 0; i < kLayers; ++i) {
    const auto seed = unsigned(10 * (i + 1));
    weight[i] = random_values<T>(count(N[i], K), seed);
    dy[i] = random_values<T>(count(M, N[i]), seed + 1);
    A[i] = random_values<TA>(count(r[i], K), seed + 2);
    B[i] = random_values<TA>(count(N[i], r[i]), seed + 3);
    const T* const W = memory.copy(weight[i]);
    const Weight<T> lies =
        transposed ? Weight<T>{{W, K, N[i], N[i]}, true} : Weight<T>{{W, N[i], K, K}, false};
    const TA* const lora_A = memory.copy(A[i]);
    const TA* const lora_B = memory.copy(B[i]);
    float* const h = memory.fresh<float>(count(M, r[i]));
    forwards.push_back({x_on_gpu, lies, i == 0 ? memory.copy(bias) : nullptr, lora_A, lora_B, r[i],
                        0.5f, nullptr, Dropout{}, memory.fresh<T>(count(M, N[i])), h});
    backwards.push_back({{memory.copy(dy[i]), M, N[i], N[i]},
                         x_on_gpu,
                         lies,
                         h,
                         lora_A,
                         lora_B,
                         r[i],
                         0.5f,
                         nullptr,
                         Dropout{},
                         dx,
                         r[i] ? memory.fresh<TA>(count(r[i], K)) : nullptr,
                         r[i] ? memory.fresh<TA>(count(N[i], r[i])) : nullptr});
  }
  run_multi_forward<T, TA>(forwards, memory.allocator(), nullptr, family);
  run_multi_backward<T, TA>(backwards, memory.allocator(), nullptr, family);
  check(cudaDeviceSynchronize());

  const auto at = [](const Doubles& m, int columns) {
    return [&m, columns](int i, int j) { return m[size_t(i) * columns + j]; };
  };
  const auto turned = [](const Doubles& m, int columns) {
    return [&m, columns](int i, int j) { return m[size_t(j) * columns + i]; };
  };
  const double bound = 2.0 / 512 + 0x1p-24 * std::sqrt(double(M + K + N[0]));
  const Doubles X = widened(x);
  Doubles want_dx(count(M, K));
  for (int i = 0; i < kLayers; ++i) {
    const int columns = N[i], rank = r[i];
    const Doubles a = widened(A[i]), b = widened(B[i]), DY = widened(dy[i]);
    Doubles W = widened(weight[i]);
    if (transposed) {
      const Doubles lies = W;
      for (size_t e = 0; e < W.size(); ++e) W[e] = lies[e % K * size_t(columns) + e / K];
    }
    Doubles y(count(M, columns)), h(count(M, rank)), dh(count(M, rank));
    Doubles dA(count(rank, K)), dB(count(columns, rank));
    for (size_t e = 0; i == 0 && e < y.size(); ++e) y[e] = bias[e % size_t(columns)];
    add_product(h, M, rank, K, 1.0, at(X, K), turned(a, K));
    add_product(y, M, columns, K, 1.0, at(X, K), turned(W, K));
    add_product(y, M, columns, rank, 0.5, at(h, rank), turned(b, rank));
    add_product(dh, M, rank, columns, 0.5, at(DY, columns), at(b, rank));
    add_product(dB, columns, rank, M, 0.5, turned(DY, columns), at(h, rank));
    add_product(dA, rank, K, M, 1.0, turned(dh, rank), at(X, K));
    add_product(want_dx, M, K, rank, 1.0, at(dh, rank), at(a, K));
    add_product(want_dx, M, K, columns, 1.0, at(DY, columns), at(W, K));
    expect_close("y", fetched(forwards[i].y, y.size()), y, bound);
    if (rank == 0) continue;
    expect_close("h", fetched(forwards[i].h, h.size()), h, bound);
    expect_close("dA", fetched(backwards[i].dA, dA.size()), dA, bound);
    expect_close("dB", fetched(backwards[i].dB, dB.size()), dB, bound);
  }
  expect_close("dx", fetched(dx, want_dx.size()), want_dx, bound);
}

}  // namespace gpu_test
