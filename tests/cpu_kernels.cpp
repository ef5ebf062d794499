// The CPU's vector kernels over odd sizes, on memory of exactly the size that they are promised:
// for AddressSanitizer and UndefinedBehaviorSanitizer (tests/test_cpu_kernels_sanitized.py). What
// is to be written starts as NaN and has to end finite. With the argument "canary" the gradient of
// x is one element short, which has to be noticed.
#define LORA_EXT_ISA isa_sanitized
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/kernels_isa.cpp"

using namespace lora_ext;
using isa_sanitized::kKernels;

namespace {

bool canary = false;

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

struct Size {
  int64_t M, N, K, r;
};

DropoutArgs dropout_of(bool enabled) {
  return enabled ? DropoutArgs{true, dropout_threshold(0.3), dropout_scale(0.3), {7, 9}}
                 : DropoutArgs{false, dropout_threshold(0.0), 1.0, {}};
}

Buffer pack(const LoraLinearKernels& kernels, const Buffer& adapter, int64_t rows,
            int64_t columns) {
  Buffer packed(1, kernels.packed_bytes(rows, columns));
  kernels.pack(adapter.data(), rows, columns, 0, rows / 2, packed.data());
  kernels.pack(adapter.data(), rows, columns, rows / 2, rows, packed.data());
  return packed;
}

// f(begin, end) for two ranges of rows, as two threads have them.
template <class F>
void in_two(int64_t rows, const F& f) {
  f(0, 0, rows / 3);
  f(1, rows / 3, rows);
}

void run_lora_linear(const Pair& pair, const LoraLinearKernels& kernels, const Size& size,
                     bool dropout) {
  const auto [M, N, K, r] = size;
  constexpr int64_t kPadding = 3;
  const Buffer x = random(pair.base, M > 0 ? M * (K + kPadding) - kPadding : 0);
  const Buffer dy = random(pair.base, M * N);
  const Buffer A = random(pair.adapter, r * K), B = random(pair.adapter, N * r);
  const Buffer A_t = pack(kernels, A, r, K), B_t = pack(kernels, B, N, r);
  const Buffer bias = random(pair.compute, N);
  const Buffer scratch(1, kernels.scratch_bytes(K, r));
  const Buffer y = empty(pair.base, M * N), h = empty(pair.compute, M * r);
  const ForwardArgs forward{M,
                            K,
                            N,
                            r,
                            x.data(),
                            K + kPadding,
                            A_t.data(),
                            B_t.data(),
                            bias.data(),
                            0.5,
                            dropout_of(dropout),
                            y.data(),
                            h.data()};
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.forward_rows(forward, begin, end, scratch.data());
  });
  expect_finite("y", pair.base, y);
  expect_finite("h", pair.compute, h);

  // Every subset of the gradients, with h given and made again
  for (int wanted = 1; wanted < 16; ++wanted) {
    const bool wants_dx = wanted & 1, wants_dA = (wanted & 2) && r * K > 0;
    const bool wants_dB = (wanted & 4) && N * r > 0, has_h = wanted & 8;
    const Buffer dx = empty(pair.base, wants_dx ? M * K - (canary && K > 1) : 0);
    const Buffer sums_A = empty(pair.compute, wants_dA ? 2 * r * K : 0);
    const Buffer sums_B = empty(pair.compute, wants_dB ? 2 * r * N : 0);
    BackwardArgs backward{};
    backward.M = M, backward.K = K, backward.N = N, backward.r = r;
    backward.dy = dy.data(), backward.lddy = N;
    const bool reads_x = wants_dA || (wants_dB && !has_h);
    backward.x = reads_x ? x.data() : nullptr, backward.ldx = reads_x ? K + kPadding : 0;
    backward.h = has_h ? h.data() : nullptr;
    backward.lora_A = A.data(), backward.lora_B = B.data(), backward.lora_A_t = A_t.data();
    backward.scaling = 0.5, backward.dropout = dropout_of(dropout), backward.dx = dx.data();
    if (M < 3) continue;  // a range without rows leaves its sums unwritten
    in_two(M, [&](int part, int64_t begin, int64_t end) {
      kernels.backward_rows(backward, begin, end, sums_A.at(part * r * K), sums_B.at(part * r * N),
                            scratch.data());
    });
    if (!canary) expect_finite("dx", pair.base, dx);
    const Buffer dA = empty(pair.adapter, wants_dA ? r * K : 0);
    const Buffer dB = empty(pair.adapter, wants_dB ? N * r : 0);
    if (wants_dA) kernels.reduce_a(sums_A.data(), 2, r * K, 1.0, r, K, 0, r, dA.data());
    if (wants_dB) kernels.reduce_b(sums_B.data(), 2, r * N, 0.5, N, r, 0, N, dB.data());
    expect_finite("dA", pair.adapter, dA);
    expect_finite("dB", pair.adapter, dB);
  }
}

void run_merge(const Pair& pair, const MergeKernels& kernels, const Size& size) {
  const auto [M, N, K, r] = size;
  const Buffer weight = random(pair.base, N * K);
  const Buffer A = random(pair.adapter, r * K), B = random(pair.adapter, N * r);
  const Buffer rows = random(pair.compute, N), columns = random(pair.compute, K);
  const Buffer scratch(1, kernels.scratch_bytes(K, r));
  for (int scale = 0; scale < 3; ++scale) {
    in_two(N, [&](int, int64_t begin, int64_t end) {
      kernels.merge_rows(weight.data(), K, scale == 1 ? rows.data() : nullptr,
                         scale == 2 ? columns.data() : nullptr, A.data(), B.data(), K, r, 0.5,
                         begin, end, scale > 0, scratch.data());
    });
  }
  const Buffer norm_scratch(1, kernels.norm_scratch_bytes(r));
  for (const bool by_column : {false, true}) {
    const Buffer sums = random(pair.compute, by_column ? K : N);
    in_two(N, [&](int, int64_t begin, int64_t end) {
      kernels.norm_rows(weight.data(), K, A.data(), B.data(), K, r, 0.5, begin, end, by_column,
                        sums.data(), norm_scratch.data());
    });
    expect_finite("norm", pair.compute, sums);
  }
}

void run_elementwise(const Pair& pair, const ElementwiseKernels& kernels, const Size& size) {
  const int64_t M = size.M, N = size.N;
  const Buffer z = random(pair.base, M * N), dy = random(pair.base, M * N);
  const Buffer scale = random(pair.compute, N), bias = random(pair.compute, N);
  const Buffer y = empty(pair.base, M * N), dz = empty(pair.base, M * N);
  const Buffer dscale = random(pair.compute, N), dbias = random(pair.compute, N);
  const Buffer scratch = empty(pair.compute, 2 * N), dropped = empty(pair.base, M * N);
  in_two(M, [&](int, int64_t begin, int64_t end) {
    kernels.column_scale_rows({N, z.data(), N, scale.data(), bias.data(), y.data()}, begin, end);
    kernels.column_scale_backward_rows({N, dy.data(), N, z.data(), N, scale.data(), dz.data()},
                                       begin, end, dscale.data(), dbias.data(), scratch.data());
    kernels.dropout_rows(z.data(), N, N, dropout_of(true), begin, end, dropped.data());
  });
  expect_finite("column_scale", pair.base, y);
  expect_finite("dz", pair.base, dz);
  expect_finite("dscale", pair.compute, dscale);
  expect_finite("dbias", pair.compute, dbias);
  expect_finite("dropout", pair.base, dropped);
}

// As cpu/dora_linear.cpp calls them, in chunks.
void run_dropped(const Pair& pair, const DroppedKernels& kernels, const Size& size, bool transposed,
                 bool dropout) {
  const auto [M, N, K, r] = size;
  if (M == 0 || K == 0) return;
  constexpr int64_t kChunk = 37;
  const Buffer x = random(pair.base, M * K), weight = random(pair.base, N * K);
  const Buffer dy = random(pair.base, M * N), u = random(pair.base, M * N);
  const Buffer z = random(pair.base, M * N), y = random(pair.base, M * N);
  const Buffer dx = random(pair.base, M * K), scale = random(pair.compute, N);
  const Buffer scratch(1, kernels.scratch_bytes(kChunk));
  const DropoutArgs args = dropout_of(dropout);
  const DroppedWeight W{weight.data(), N, K, transposed ? 1 : K, transposed ? N : 1};
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
      kernels.forward({W, scale.data(), args.scale, z.data(), y.data()}, lists, panel,
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
  const LoraEmbeddingKernels& kernels = kKernels.lora_embedding[index];
  const Buffer tokens(8, M);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t token = static_cast<int64_t>(random_bits()) % V;
    std::memcpy(tokens.at(m), &token, 8);
  }
  const auto* token = reinterpret_cast<const int64_t*>(tokens.data());
  const Buffer weight = random(pair.base, V * D), dy = random(pair.base, M * D);
  const Buffer A = random(pair.adapter, r * V), B = random(pair.adapter, D * r);
  const Buffer B_t = pack(kKernels.lora_linear[index], B, D, r);
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
  for (int i = 0; i < kDtypePairs; ++i) {
    for (const bool dropout : {false, true}) {
      run_lora_linear(kPairs[i], kKernels.lora_linear[i], size, dropout);
      run_dropped(kPairs[i], kKernels.dropped[i], size, dropout, true);
    }
    run_dropped(kPairs[i], kKernels.dropped[i], size, false, false);
    run_merge(kPairs[i], kKernels.merge[i], size);
    run_elementwise(kPairs[i], kKernels.elementwise[i], size);
    run_embedding(kPairs[i], i, size);
  }
  for (const int64_t columns : {int64_t{0}, size.N, size.K}) {
    const Buffer keep(1, size.M * columns);
    kKernels.dropout_mask_rows({7, 9}, dropout_threshold(0.3), columns, 5, 5 + size.M, keep.data());
    for (int64_t i = 0; i < keep.count; ++i) {
      if (keep.data()[i] > 1) std::puts("dropout_mask: neither 0 nor 1"), std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char**) {
  canary = argc > 1;
  // Around the widths of vectors, tiles, panels (48 rows), blocks (128 columns) and chunks (1024)
  const Size sizes[] = {{1, 1, 1, 1},     {3, 5, 7, 2},       {47, 17, 31, 9},  {49, 33, 129, 16},
                        {97, 70, 257, 3}, {5, 1025, 130, 17}, {6, 15, 1031, 8}, {50, 64, 128, 33},
                        {7, 63, 127, 1},  {96, 9, 16, 65},    {0, 4, 5, 2},     {50, 0, 5, 2},
                        {50, 4, 0, 2},    {50, 4, 5, 0},      {50, 0, 0, 2},    {50, 0, 5, 0},
                        {50, 4, 0, 0},    {4, 0, 0, 0},       {2, 8, 8, 8}};
  for (const Size& size : sizes) run_all(size);
  std::puts("clean");
}
