// The CPU's vector kernels over odd sizes, on memory of exactly the size that they are promised:
// for AddressSanitizer and UndefinedBehaviorSanitizer (tests/test_cpu_kernels_sanitized.py). What
// is to be written starts as NaN and has to end finite; of lora_linear, on small whole numbers, it
// has to be the exact result, rounded once. With the argument "canary" the gradient of x is one
// element short, which has to be noticed; with "wrong" its expectation is.
#define LORA_EXT_ISA isa_sanitized
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/kernels_isa.cpp"
#include "cpu_values.h"

#ifdef __AVX512F__
#include "cpu_bf16_kernels.h"
#endif

#include "cpu_grouped_rows.h"
#include "cpu_quantized_rows.h"

using isa_sanitized::kKernels;

namespace {

bool canary = false, wrong = false;

void run_lora_linear(const Pair& pair, const LoraLinearKernels& kernels, const Size& size,
                     bool dropout) {
  const auto [M, N, K, r] = size;
  constexpr int64_t kPadding = 3;
  constexpr double kScaling = 0.5;
  // With few rows the sums need more than 8 bits; with more the kernels on bf16 dot products round
  // some of them.
  const int64_t most = M <= 96 ? 15 : 1;
  const Buffer x = integers(pair.base, M > 0 ? M * (K + kPadding) - kPadding : 0, most);
  const Buffer dy = integers(pair.base, M * N, most);
  const Buffer A = integers(pair.adapter, r * K), B = integers(pair.adapter, N * r);
  const Buffer A_t = pack(kernels, A, r, K), B_t = pack(kernels, B, N, r);
  const Buffer bias = integers(pair.compute, N);
  const Buffer scratch(1, kernels.scratch_bytes(K, r));
  const Buffer y = empty(pair.base, M * N), h = empty(pair.compute, M * r);
  // Rows of the mask in another order than those of x, as rows of one adapter among many have them.
  const bool turned = M % 2 == 1;
  std::vector<int32_t> rows(M);
  for (int64_t i = 0; i < M; ++i) rows[i] = static_cast<int32_t>(turned ? M - 1 - i : i);
  DropoutArgs drops = dropout_of(dropout);
  if (turned) drops.rows = rows.data();
  const LoraLinearForwardArgs forward{
      M,          K,           N,        r,     x.data(), K + kPadding, A_t.data(),
      B_t.data(), bias.data(), kScaling, drops, y.data(), h.data()};
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.forward_rows(forward, begin, end, scratch.data());
  });

  const std::vector<double> a = values_of(pair.adapter, A, K, r, K);
  const std::vector<double> b = values_of(pair.adapter, B, r, N, r);
  const std::vector<double> g = values_of(pair.base, dy, N, M, N);
  std::vector<double> dropped = values_of(pair.base, x, K + kPadding, M, K);
  std::vector<double> factors(M * K, 1.0);
  if (dropout) {
    const Buffer keep(1, M * K);
    kKernels[0].dropout.mask_rows(dropout_of(true).rng, dropout_of(true).threshold, K, 0, M,
                                  keep.data());
    for (int64_t i = 0; i < M * K; ++i) factors[i] = 2.0 * keep.data()[rows[i / K] * K + i % K];
  }
  for (int64_t i = 0; i < M * K; ++i) dropped[i] *= factors[i];
  const std::vector<double> exact_h = times(1.0, {dropped, K, 1}, {a, 1, K}, M, K, r);
  std::vector<double> exact_y = times(kScaling, {exact_h, r, 1}, {b, 1, r}, M, r, N);
  for (int64_t i = 0; i < M * N; ++i) exact_y[i] += value_of(pair.compute, bias, i % N);
  const std::vector<double> dh = times(kScaling, {g, N, 1}, {b, r, 1}, M, N, r);
  std::vector<double> exact_dx = times(1.0, {dh, r, 1}, {a, K, 1}, M, r, K);
  for (int64_t i = 0; i < M * K; ++i) exact_dx[i] *= factors[i];
  if (wrong && M * K > 0) exact_dx[M * K - 1] += 1.0;
  const std::vector<double> exact_dA = times(1.0, {dh, 1, r}, {dropped, K, 1}, r, M, K);
  const std::vector<double> exact_dB = times(kScaling, {g, 1, N}, {exact_h, r, 1}, N, M, r);
  expect("y", pair.base, y, exact_y);
  expect("h", pair.compute, h, exact_h);

  // Every subset of the gradients, with h given and made again
  for (int wanted = 1; wanted < 16; ++wanted) {
    const bool wants_dx = wanted & 1, wants_dA = (wanted & 2) && r * K > 0;
    const bool wants_dB = (wanted & 4) && N * r > 0, has_h = wanted & 8;
    const Buffer dx = empty(pair.base, wants_dx ? M * K - (canary && K > 1) : 0);
    const Buffer sums_A = empty(pair.compute, wants_dA ? 2 * r * K : 0);
    const Buffer sums_B = empty(pair.compute, wants_dB ? 2 * r * N : 0);
    LoraLinearBackwardArgs backward{};
    backward.M = M, backward.K = K, backward.N = N, backward.r = r;
    backward.dy = dy.data(), backward.lddy = N;
    const bool reads_x = wants_dA || (wants_dB && !has_h);
    backward.x = reads_x ? x.data() : nullptr, backward.ldx = reads_x ? K + kPadding : 0;
    backward.h = has_h ? h.data() : nullptr;
    backward.lora_A = A.data(), backward.lora_B = B.data(), backward.lora_A_t = A_t.data();
    backward.scaling = kScaling, backward.dropout = drops, backward.dx = dx.data();
    if (M < 3) continue;       // a range without rows leaves its sums unwritten
    const bool adds = turned;  // both ranges into the same sums
    in_two(M, [&](int range, int64_t begin, int64_t end) {
      const int part = adds ? 0 : range;
      backward.add = adds && range == 1;
      kernels.backward_rows(backward, begin, end, sums_A.at(part * r * K), sums_B.at(part * r * N),
                            scratch.data());
    });
    expect("dx", pair.base, dx, exact_dx);
    const Buffer dA = empty(pair.adapter, wants_dA ? r * K : 0);
    const Buffer dB = empty(pair.adapter, wants_dB ? N * r : 0);
    if (wants_dA) kernels.reduce_a(sums_A.data(), adds ? 1 : 2, r * K, 1.0, r, K, 0, r, dA.data());
    if (wants_dB)
      kernels.reduce_b(sums_B.data(), adds ? 1 : 2, r * N, kScaling, N, r, 0, N, dB.data());
    expect("dA", pair.adapter, dA, exact_dA);
    expect("dB", pair.adapter, dB, exact_dB);
  }
}

// As float, or as it is.
Buffer widened(const Type& type, const Buffer& buffer, const Type& to) {
  Buffer result = empty(to, buffer.count);
  for (int64_t i = 0; i < buffer.count; ++i) {
    const double value = value_of(type, buffer, i);
    const auto single = static_cast<float>(value);
    if (to.size == type.size) {
      std::memcpy(result.at(i), buffer.at(i), to.size);
    } else {
      std::memcpy(result.at(i), &single, sizeof(single));  // the only type that is widened to
    }
  }
  return result;
}

// One of several layers of one x, with what is exact of it.
struct Layer {
  int64_t N, r;
  double scaling;
  DropoutArgs dropout;
  Buffer dy, A, wide_A, B, A_t, B_t, y, h;
  std::vector<double> dropped, factors, exact_h, dh;
};

void run_lora_linear_multi(const Pair& pair, const LoraLinearKernels& kernels, const Size& size,
                           bool dropout) {
  const auto [M, N, K, r] = size;
  if (M < 3 || N == 0 || K == 0 || r == 0) return;  // never given to these kernels
  if (canary) return;  // what it wrote past its end would be found here, as memory of the heap
  const Buffer x = integers(pair.base, M * K);
  const int64_t ranks[] = {r, 1, r + 2}, widths[] = {N, N + 3, 2};
  const double scalings[] = {0.5, 2.0, 1.0};
  const int64_t R = 2 * r + 3;
  std::vector<Layer> layers;
  // What dx is made of is widened, but for the kernels on bf16 dot products.
  const Type& wide =
      &kernels == &kKernels[&pair - kPairs].lora_linear ? pair.compute : pair.adapter;
  Buffer all_A = empty(pair.adapter, R * K), all_A_t(1, kernels.packed_bytes(R, K));
  int64_t rank = 0;
  for (int i = 0; i < 3; ++i) {
    const int64_t n = widths[i], q = ranks[i];
    Buffer A = integers(pair.adapter, q * K), B = integers(pair.adapter, n * q);
    Buffer A_t = pack(kernels, A, q, K), B_t = pack(kernels, B, n, q);
    std::memcpy(all_A.at(rank * K), A.data(), pair.adapter.size * q * K);
    Buffer wide_A = widened(pair.adapter, A, wide);
    // The second layer keeps everything; the third drops others than the first.
    DropoutArgs drops = dropout_of(dropout && i != 1);
    drops.rng.offset += i;
    std::vector<double> factors(M * K, 1.0), dropped = values_of(pair.base, x, K, M, K);
    if (drops.enabled) {
      const Buffer keep(1, M * K);
      kKernels[0].dropout.mask_rows(drops.rng, drops.threshold, K, 0, M, keep.data());
      for (int64_t j = 0; j < M * K; ++j) factors[j] = 2.0 * keep.data()[j];
    }
    for (int64_t j = 0; j < M * K; ++j) dropped[j] *= factors[j];
    Buffer dy = integers(pair.base, M * n);
    const std::vector<double> a = values_of(pair.adapter, A, K, q, K);
    const std::vector<double> b = values_of(pair.adapter, B, q, n, q);
    const std::vector<double> g = values_of(pair.base, dy, n, M, n);
    std::vector<double> exact_h = times(1.0, {dropped, K, 1}, {a, 1, K}, M, K, q);
    std::vector<double> dh = times(scalings[i], {g, n, 1}, {b, q, 1}, M, n, q);
    layers.push_back({n, q, scalings[i], drops, std::move(dy), std::move(A), std::move(wide_A),
                      std::move(B), std::move(A_t), std::move(B_t), empty(pair.base, M * n),
                      empty(pair.compute, M * q), std::move(dropped), std::move(factors),
                      std::move(exact_h), std::move(dh)});
    rank += q;
  }
  kernels.pack(all_A.data(), R, K, 0, R, all_A_t.data());
  const Buffer scratch(1, kernels.multi_scratch_bytes(K, R, 3));

  std::vector<LoraLinearForwardArgs> forward;
  for (const Layer& one : layers) {
    forward.push_back({M, K, one.N, one.r, x.data(), K, one.A_t.data(), one.B_t.data(), nullptr,
                       one.scaling, one.dropout, one.y.data(), one.h.data()});
  }
  const LoraLinearMultiForwardArgs all{forward.data(), 3, R, dropout ? nullptr : all_A_t.data()};
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.multi_forward_rows(all, begin, end, scratch.data());
  });
  std::vector<double> exact_dx(M * K);
  const Buffer base = integers(pair.base, M * K, 7);  // what dx is added to
  for (int64_t j = 0; j < M * K; ++j) exact_dx[j] = value_of(pair.base, base, j);
  for (const Layer& one : layers) {
    const std::vector<double> b = values_of(pair.adapter, one.B, one.r, one.N, one.r);
    expect("h of several", pair.compute, one.h, one.exact_h);
    expect("y of several", pair.base, one.y,
           times(one.scaling, {one.exact_h, one.r, 1}, {b, 1, one.r}, M, one.r, one.N));
    const std::vector<double> a = values_of(pair.adapter, one.A, K, one.r, K);
    const std::vector<double> own = times(1.0, {one.dh, one.r, 1}, {a, K, 1}, M, one.r, K);
    for (int64_t j = 0; j < M * K; ++j) exact_dx[j] += own[j] * one.factors[j];
  }

  // dx or not, dA of all, of none or of some, dB with h given or made again
  for (int wanted = 0; wanted < 12; ++wanted) {
    const bool wants_dx = wanted % 2, has_h = wanted / 2 % 2;
    const int wants_dA = wanted / 4;
    const Buffer dx = empty(pair.base, wants_dx ? M * K : 0);
    if (wants_dx) std::memcpy(dx.data(), base.data(), pair.base.size * M * K);
    const Buffer sums_A = empty(pair.compute, 2 * R * K);
    std::vector<Buffer> sums_B;
    std::vector<LoraLinearBackwardArgs> backward;
    for (const Layer& one : layers) {
      LoraLinearBackwardArgs args{};
      args.M = M, args.K = K, args.N = one.N, args.r = one.r;
      args.dy = one.dy.data(), args.lddy = one.N, args.x = x.data(), args.ldx = K;
      args.h = has_h ? one.h.data() : nullptr;
      args.lora_A = one.wide_A.data(), args.lora_B = one.B.data();
      args.lora_A_t = one.A_t.data();
      args.scaling = one.scaling, args.dropout = one.dropout;
      backward.push_back(args);
      sums_B.push_back(empty(pair.compute, 2 * one.r * one.N));
    }
    const LoraLinearMultiBackwardArgs call{backward.data(), 3, R, wants_dx ? dx.data() : nullptr};
    in_two(M, [&](int part, int64_t begin, int64_t end) {
      std::vector<void*> dA, dB;
      int64_t first = 0;
      for (int i = 0; i < 3; ++i) {
        const bool wants = wants_dA == 0 || (wants_dA == 2 && i != 1);
        dA.push_back(wants ? sums_A.at((part * R + first) * K) : nullptr);
        dB.push_back(sums_B[i].at(part * layers[i].r * layers[i].N));
        first += layers[i].r;
      }
      kernels.multi_backward_rows(call, begin, end, dA.data(), dB.data(), scratch.data());
    });
    if (wants_dx) expect("dx of several", pair.base, dx, exact_dx);
    int64_t first = 0;
    for (int i = 0; i < 3; ++i) {
      const Layer& one = layers[i];
      if (wants_dA == 0 || (wants_dA == 2 && i != 1)) {
        const Buffer dA = empty(pair.adapter, one.r * K);
        kernels.reduce_a(sums_A.at(first * K), 2, R * K, 1.0, one.r, K, 0, one.r, dA.data());
        expect("dA of several", pair.adapter, dA,
               times(1.0, {one.dh, 1, one.r}, {one.dropped, K, 1}, one.r, M, K));
      }
      const Buffer dB = empty(pair.adapter, one.N * one.r);
      kernels.reduce_b(sums_B[i].data(), 2, one.r * one.N, one.scaling, one.N, one.r, 0, one.N,
                       dB.data());
      const std::vector<double> g = values_of(pair.base, one.dy, one.N, M, one.N);
      expect("dB of several", pair.adapter, dB,
             times(one.scaling, {g, 1, one.N}, {one.exact_h, one.r, 1}, one.N, M, one.r));
      first += one.r;
    }
  }
}

void run_merge(const Pair& pair, const CpuKernels& kernels, const Size& size) {
  const auto [M, N, K, r] = size;
  const Buffer weight = random(pair.base, N * K);
  const Buffer A = random(pair.adapter, r * K), B = random(pair.adapter, N * r);
  const Buffer rows = random(pair.compute, N), columns = random(pair.compute, K);
  const Buffer scratch(1, kernels.merge.scratch_bytes(r));
  for (int scale = 0; scale < 3; ++scale) {
    in_two(N, [&](int, int64_t begin, int64_t end) {
      kernels.merge.rows(weight.data(), K, scale == 1 ? rows.data() : nullptr,
                         scale == 2 ? columns.data() : nullptr, A.data(), B.data(), K, r, 0.5,
                         begin, end, scale > 0, scratch.data());
    });
  }
  const Buffer norm_scratch(1, kernels.weight_norm.scratch_bytes(r));
  for (const bool by_column : {false, true}) {
    const Buffer sums = random(pair.compute, by_column ? K : N);
    in_two(N, [&](int, int64_t begin, int64_t end) {
      kernels.weight_norm.rows(weight.data(), K, A.data(), B.data(), K, r, 0.5, begin, end,
                               by_column, sums.data(), norm_scratch.data());
    });
    expect_finite("norm", pair.compute, sums);
  }
}

void run_elementwise(const Pair& pair, const CpuKernels& kernels, const Size& size) {
  const int64_t M = size.M, N = size.N;
  const Buffer z = random(pair.base, M * N), dy = random(pair.base, M * N);
  const Buffer scale = random(pair.compute, N), bias = random(pair.compute, N);
  const Buffer y = empty(pair.base, M * N), dz = empty(pair.base, M * N);
  const Buffer dscale = random(pair.compute, N), dbias = random(pair.compute, N);
  const Buffer scratch = empty(pair.compute, 2 * N), dropped = empty(pair.base, M * N);
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.column_scale.forward_rows({N, z.data(), N, scale.data(), bias.data(), y.data()}, begin,
                                      end);
    kernels.column_scale.backward_rows({N, dy.data(), N, z.data(), N, scale.data(), dz.data()},
                                       begin, end, dscale.data(), dbias.data(), scratch.data());
    kernels.dropout.rows(z.data(), N, N, dropout_of(true), 0, begin, end, dropped.data());
  });
  expect_finite("column_scale", pair.base, y);
  expect_finite("dz", pair.base, dz);
  expect_finite("dscale", pair.compute, dscale);
  expect_finite("dbias", pair.compute, dbias);
  expect_finite("dropout", pair.base, dropped);
}

// As cpu/dora_linear.cpp calls them, in chunks.
void run_dora_linear(const Pair& pair, const DoraLinearKernels& kernels, const Size& size,
                     bool transposed, bool dropout) {
  const auto [M, N, K, r] = size;
  if (M == 0 || K == 0) return;
  constexpr int64_t kChunk = 37;
  const Buffer x = random(pair.base, M * K), weight = random(pair.base, N * K);
  const Buffer dy = random(pair.base, M * N), u = random(pair.base, M * N);
  const Buffer z = random(pair.base, M * N), y = random(pair.base, M * N);
  const Buffer dx = random(pair.base, M * K), scale = random(pair.compute, N);
  const Buffer scratch(1, kernels.scratch_bytes(kChunk));
  const DropoutArgs args = dropout_of(dropout);
  const StridedWeight W{weight.data(), N, K, transposed ? 1 : K, transposed ? N : 1};
  const int64_t blocks = (K + kDropoutBlock - 1) / kDropoutBlock;
  for (int64_t first = 0; first < M; first += kChunk) {
    const int64_t rows = first + kChunk < M ? kChunk : M - first;
    const Buffer keep(2, rows * blocks * kDropoutSlots), starts(4, blocks * rows + 1);
    auto* start = reinterpret_cast<int32_t*>(starts.data());
    auto* words = reinterpret_cast<uint16_t*>(keep.data());
    in_two(rows, [&](int, int64_t begin, int64_t end) {
      kernels.count(args, K, first, rows, begin, end, words, start);
    });
    int32_t entries = 0;
    for (int64_t i = 0; i < blocks * rows; ++i) {
      const int32_t count = start[i];
      start[i] = entries, entries += count;
    }
    start[blocks * rows] = entries;
    const Buffer columns(1, entries), values = empty(pair.compute, entries);
    kernels.list(x.data(), K, K, first, rows, 0, rows, words, start, columns.data(), values.data());
    const DroppedLists lists{first, rows, start, columns.data(), values.data()};
    for (int64_t panel = 0; panel * kernels.panel_width < N; ++panel) {
      kernels.forward({W, scale.data(), args.survivor, z.data(), y.data()}, lists, panel,
                      scratch.data());
    }
    kernels.backward({W, u.data(), dy.data(), N, dx.data()}, lists, 0, blocks / 2, scratch.data());
    kernels.backward({W, u.data(), dy.data(), N, dx.data()}, lists, blocks / 2, blocks,
                     scratch.data());
  }
  expect_finite("v", pair.base, z);
  expect_finite("dora_linear", pair.base, y);
  expect_finite("dx of dora_linear", pair.base, dx);
}

void run_embedding(const Pair& pair, int index, const Size& size) {
  const auto [M, D, V, r] = size;
  if (V == 0) return;
  const LoraEmbeddingKernels& kernels = kKernels[index].lora_embedding;
  const Buffer tokens(8, M);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t token = static_cast<int64_t>(random_bits()) % V;
    std::memcpy(tokens.at(m), &token, 8);
  }
  const auto* token = reinterpret_cast<const int64_t*>(tokens.data());
  const Buffer weight = random(pair.base, V * D), dy = random(pair.base, M * D);
  const Buffer A = random(pair.adapter, r * V), B = random(pair.adapter, D * r);
  const Buffer B_t = pack(kKernels[index].lora_linear, B, D, r);
  const Buffer scratch(1, kernels.scratch_bytes(r)), y = empty(pair.base, M * D);
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.forward_rows({V, D, r, token, weight.data(), D, A.data(), B_t.data(), 0.5, y.data()},
                         begin, end, scratch.data());
  });
  expect_finite("lora_embedding", pair.base, y);
  const Buffer dh = empty(pair.compute, M * r), sums = empty(pair.compute, 2 * r * D);
  if (M < 3) return;
  in_two(M, [&](int part, int64_t begin, int64_t end) {
    kernels.backward_rows({V, D, r, token, dy.data(), D, A.data(), B.data(), 0.5, dh.data()}, begin,
                          end, sums.at(part * r * D), scratch.data());
  });
  expect_finite("dh", pair.compute, dh);
  expect_finite("dB of lora_embedding", pair.compute, sums);
}

void run_all(const Size& size) {
#ifdef __AVX512F__
  for (const bool dropout : {false, true}) {
    for (const auto* kernels : {&isa_sanitized::kBf16Kernels, &isa_sanitized::kAmxKernels}) {
      run_lora_linear(kPairs[2], *kernels, size, dropout);
      run_grouped_rows(kPairs[2], *kernels, kKernels[0].dropout, size, dropout);
      run_lora_linear_multi(kPairs[2], *kernels, size, dropout);
    }
  }
#endif
  for (int i = 0; i < kDtypePairs; ++i) {
    for (const bool dropout : {false, true}) {
      run_lora_linear(kPairs[i], kKernels[i].lora_linear, size, dropout);
      run_grouped_rows(kPairs[i], kKernels[i].lora_linear, kKernels[0].dropout, size, dropout);
      run_lora_linear_multi(kPairs[i], kKernels[i].lora_linear, size, dropout);
      run_dora_linear(kPairs[i], kKernels[i].dora_linear, size, dropout, true);
    }
    run_dora_linear(kPairs[i], kKernels[i].dora_linear, size, false, false);
    run_merge(kPairs[i], kKernels[i], size);
    run_elementwise(kPairs[i], kKernels[i], size);
    run_embedding(kPairs[i], i, size);
    run_quantized(kPairs[i], kKernels[i].quantized, size);
  }
  for (const int64_t columns : {int64_t{0}, size.N, size.K}) {
    const Buffer keep(1, size.M * columns);
    kKernels[0].dropout.mask_rows({7, 9}, dropout_threshold(0.3), columns, 5, 5 + size.M,
                                  keep.data());
    for (int64_t i = 0; i < keep.count; ++i) {
      if (keep.data()[i] > 1) std::puts("dropout_mask: neither 0 nor 1"), std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  canary = argc > 1 && !std::strcmp(argv[1], "canary");
  wrong = argc > 1 && !std::strcmp(argv[1], "wrong");
  // Around the widths of vectors, tiles, panels (48 rows), blocks (128 columns) and chunks (1024)
  const Size sizes[] = {{1, 1, 1, 1},     {3, 5, 7, 2},       {47, 17, 31, 9},  {49, 33, 129, 16},
                        {97, 70, 257, 3}, {5, 1025, 130, 17}, {6, 15, 1031, 8}, {50, 64, 128, 33},
                        {7, 63, 127, 1},  {96, 9, 16, 65},    {0, 4, 5, 2},     {50, 0, 5, 2},
                        {50, 4, 0, 2},    {50, 4, 5, 0},      {50, 0, 0, 2},    {50, 0, 5, 0},
                        {50, 4, 0, 0},    {4, 0, 0, 0},       {2, 8, 8, 8},     {301, 40, 33, 5}};
  for (const Size& size : sizes) run_all(size);
  std::puts("clean");
}
