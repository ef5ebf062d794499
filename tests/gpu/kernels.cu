// Runs every kernel of csrc/kernels, for compute-sanitizer, or one planted mistake that this has to
// report:
//
//   kernels_on_gpu sm80 | sm90 [small]                       one family, results checked; small:
//                                                            of bf16 and few tiles, in less time
//   kernels_on_gpu memcheck | racecheck | initcheck | synccheck   the mistake for this tool
//
// `make gpu-sanitize` builds and runs it (tests/gpu/test_sanitizer.py).
#include "cuda/lora_linear_path.h"
#include "multi.h"
#include "problem.h"
#include "quantized.h"
#include "rows.h"

using namespace lora_ext;
using namespace gpu_test;

namespace {

struct Size {
  int M, K, N, r;
};

// y and h, then dx, dA and dB, of random matrices.
template <class T, class TA>
void run_lora_linear(const Size& size, double dropout_p, int capability) {
  const auto [M, K, N, r] = size;
  const auto count = [](int rows, int columns) { return size_t(rows) * size_t(columns); };
  const auto x = random_values<T>(count(M, K), 1), weight = random_values<T>(count(N, K), 2);
  const auto dy = random_values<T>(count(M, N), 3);
  const auto lora_A = random_values<TA>(count(r, K), 4), lora_B = random_values<TA>(count(N, r), 5);
  const auto bias = random_values<float>(size_t(N), 6);
  const DropoutRng rng{1234567890123, 8};
  const uint32_t threshold = dropout_threshold(dropout_p);
  const float scaling = 0.25f, factor = 2.0f;

  Memory memory;
  const Dropout dropout{dropout_p > 0, threshold, static_cast<float>(dropout_scale(dropout_p)),
                        memory.copy(std::vector<int64_t>{int64_t(rng.seed), int64_t(rng.offset)})};
  const float* scaling_factor = memory.copy(std::vector<float>{factor});
  const Matrix<T> x_on_gpu{memory.copy(x), M, K, K}, dy_on_gpu{memory.copy(dy), M, N, N};
  const Weight<T> weight_on_gpu{{memory.copy(weight), N, K, K}};
  const TA *A_on_gpu = memory.copy(lora_A), *B_on_gpu = memory.copy(lora_B);
  T *y = memory.fresh<T>(count(M, N)), *dx = memory.fresh<T>(count(M, K));
  float* h = memory.fresh<float>(count(M, r));
  TA *dA = memory.fresh<TA>(count(r, K)), *dB = memory.fresh<TA>(count(N, r));
  const bool sm90 = capability == 90;
  const CudaCall call{false, 0, M, N, K, r, 0, 0, true, dropout.enabled, rows_of_sizes(N, K)};
  const KernelFamily family =
      choose_cuda_path({call, capability, true, sm90, CudaWish::Fused, {}}).family;
  run_forward(ForwardCall<T, TA>{x_on_gpu, weight_on_gpu, memory.copy(bias), A_on_gpu, B_on_gpu, r,
                                 scaling, scaling_factor, dropout, y, h},
              memory.allocator(), nullptr, family);
  // h is saved, or made again from x
  run_backward(
      BackwardCall<T, TA>{dy_on_gpu, x_on_gpu, weight_on_gpu, M % 2 ? h : nullptr, A_on_gpu,
                          B_on_gpu, r, scaling, scaling_factor, dropout, dx, dA, dB},
      memory.allocator(), nullptr, family);
  check(cudaDeviceSynchronize());

  const Doubles X = widened(x), W = widened(weight), DY = widened(dy);
  const Doubles A = widened(lora_A), B = widened(lora_B);
  const double s = double(scaling) * factor;
  Doubles keep(count(M, K), 1.0), dropped(X);
  for (size_t i = 0; dropout.enabled && i < keep.size(); ++i) {
    const bool kept = dropout_keep(rng, int64_t(i) / K, int64_t(i) % K, threshold);
    keep[i] = kept ? dropout_scale(dropout_p) : 0.0;
    dropped[i] *= keep[i];
  }
  const auto at = [](const Doubles& m, int columns) {
    return [&m, columns](int i, int j) { return m[size_t(i) * columns + j]; };
  };
  const auto transposed = [](const Doubles& m, int columns) {
    return [&m, columns](int i, int j) { return m[size_t(j) * columns + i]; };
  };
  Doubles want_h(count(M, r)), want_y(count(M, N)), dh(count(M, r)), want_dB(count(N, r));
  Doubles want_dA(count(r, K)), want_dx(count(M, K));
  add_product(want_h, M, r, K, 1.0, at(dropped, K), transposed(A, K));
  for (size_t i = 0; i < want_y.size(); ++i) want_y[i] = bias[i % size_t(N)];
  add_product(want_y, M, N, K, 1.0, at(X, K), transposed(W, K));
  add_product(want_y, M, N, r, s, at(want_h, r), transposed(B, r));
  add_product(dh, M, r, N, s, at(DY, N), at(B, r));
  add_product(want_dB, N, r, M, s, transposed(DY, N), at(want_h, r));
  add_product(want_dA, r, K, M, 1.0, transposed(dh, r), at(dropped, K));
  add_product(want_dx, M, K, r, 1.0, at(dh, r), at(A, K));
  for (size_t i = 0; i < want_dx.size(); ++i) want_dx[i] *= keep[i];
  add_product(want_dx, M, K, N, 1.0, at(DY, N), at(W, K));

  // h or dh rounded to 16 bits, and the result: of bf16 half a unit is 2^-9 at most. Sums in float.
  const double bound = 2.0 / 512 + 0x1p-24 * std::sqrt(double(M + K + N));
  expect_close("h", fetched(h, want_h.size()), want_h, bound);
  expect_close("y", fetched(y, want_y.size()), want_y, bound);
  expect_close("dB", fetched(dB, want_dB.size()), want_dB, bound);
  expect_close("dA", fetched(dA, want_dA.size()), want_dA, bound);
  expect_close("dx", fetched(dx, want_dx.size()), want_dx, bound);
}

template <class T, class TA>
void run_merge() {
  const int N = 65, K = 33, r = 5;
  const auto weight = random_values<T>(size_t(N) * K, 1);
  const auto lora_A = random_values<TA>(size_t(r) * K, 2), lora_B = random_values<TA>(N * r, 3);
  Memory memory;
  T* merged = memory.copy(weight);
  int* finite = memory.copy(std::vector<int>{1});
  const TA *A = memory.copy(lora_A), *B = memory.copy(lora_B);
  for (const bool write : {false, true}) {
    merge(MergeCall<T, TA>{merged, N, K, K, A, B, r, 0.5f, write, finite}, nullptr);
  }
  Doubles want = widened(weight);
  const Doubles a = widened(lora_A), b = widened(lora_B);
  add_product(
      want, N, K, r, 0.5, [&](int i, int j) { return b[size_t(i) * r + j]; },
      [&](int i, int j) { return a[size_t(i) * K + j]; });
  expect_close("merge", fetched(merged, want.size()), want, 1.0 / 512);
}

void run_dropout() {
  const int first_row = 5, rows = 37, columns = 300;
  Memory memory;
  int64_t* state = memory.fresh<int64_t>(2);
  fill_rng_state({false, 42, 8, nullptr, nullptr, 0}, state, nullptr);
  bool* mask = memory.fresh<bool>(rows * columns);
  dropout_mask(state, dropout_threshold(0.3), first_row, rows, columns, mask, nullptr);
  std::vector<char> got(rows * columns);
  check(cudaMemcpy(got.data(), mask, got.size(), cudaMemcpyDeviceToHost));
  for (int i = 0; i < rows * columns; ++i) {
    if (bool(got[size_t(i)]) !=
        dropout_keep({42, 8}, first_row + i / columns, i % columns, dropout_threshold(0.3))) {
      throw std::runtime_error("dropout_mask: another decision than the host's");
    }
  }
}

// Runs one check and says on stderr which it is and what was wrong; the others go on, unless CUDA
// answers nothing any more. How many were wrong.
int failures = 0;
template <class F>
void attempt(const std::string& what, const F& f) {
  std::fprintf(stderr, "%s\n", what.c_str());
  try {
    f();
  } catch (const std::exception& error) {
    ++failures;
    std::fprintf(stderr, "  WRONG: %s: %s\n", what.c_str(), error.what());
    check(cudaDeviceSynchronize());
  }
}

// Of one base and one adapter type. The last sizes are for the larger tiles, which are chosen when
// they fill the GPU, and for several tiles a block.
template <class T, class TA>
void run_types(const std::string& types, int capability, int multiprocessors, bool small) {
  const int columns = multiprocessors > 12 ? multiprocessors / 12 : 1;
  std::vector<Size> sizes = {{1, 64, 72, 1},    {37, 72, 136, 16},   {130, 200, 72, 40},
                             {65, 131, 70, 17}, {70, 136, 264, 100}, {64, 64, 64, 256}};
  for (const int width : {128, 256, 384}) {
    if (small) break;
    sizes.push_back({12 * 128, 64, width * columns, 16});
    sizes.push_back({12 * 128, width * columns, 64, 16});
  }
  for (const Size& size : sizes) {
    const auto [M, K, N, r] = size;
    for (const double dropout_p : {0.0, 0.5}) {
      if (dropout_p == 0.0 && M == 12 * 128) continue;  // for the sanitizers' time
      char what[100];
      std::snprintf(what, sizeof(what), "%s M %d K %d N %d r %d p %.1f", types.c_str(), M, K, N, r,
                    dropout_p);
      attempt(what, [&] { run_lora_linear<T, TA>(size, dropout_p, capability); });
    }
  }
  const KernelFamily family = capability == 90 ? KernelFamily::Sm90 : KernelFamily::Sm80;
  for (const bool transposed : {false, true}) {
    attempt(types + ", layers of one x" + (transposed ? ", weights transposed" : ""),
            [&] { run_multi<T, TA>(family, transposed); });
  }
}

void run_all(int capability, bool small) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  run_types<Bf16, Bf16>("bf16", capability, multiprocessors, small);
  run_types<Bf16, float>("bf16, adapters fp32", capability, multiprocessors, small);
  if (!small) {
    run_types<Fp16, Fp16>("fp16", capability, multiprocessors, false);
    run_types<Fp16, float>("fp16, adapters fp32", capability, multiprocessors, false);
  }
  attempt("merge bf16", run_merge<Bf16, Bf16>);
  attempt("merge bf16, adapters fp32", run_merge<Bf16, float>);
  attempt("merge fp16", run_merge<Fp16, Fp16>);
  attempt("merge fp16, adapters fp32", run_merge<Fp16, float>);
  attempt("merge fp32", run_merge<float, float>);
  attempt("rows bf16", run_rows<Bf16, Bf16>);
  attempt("rows bf16, adapters fp32", run_rows<Bf16, float>);
  attempt("rows fp16", run_rows<Fp16, Fp16>);
  attempt("rows fp16, adapters fp32", run_rows<Fp16, float>);
  attempt("rows fp32", run_rows<float, float>);
  attempt("dequantize bf16", run_dequantize<Bf16>);
  attempt("dequantize fp16", run_dequantize<Fp16>);
  attempt("dequantize fp32", run_dequantize<float>);
  attempt("dropout_mask", run_dropout);
  if (failures > 0) throw std::runtime_error(std::to_string(failures) + " checks failed");
}

// ---- Planted mistakes: one block of 64 threads, `out` has place for 63 --------------------------

__global__ void planted_memcheck(const int*, int* out) {
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void planted_racecheck(const int*, int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);  // and no barrier before others read it
  const int other = values[63 - threadIdx.x];
  if (threadIdx.x < 63) out[threadIdx.x] = other;
}

__global__ void planted_initcheck(const int* unwritten, int* out) {
  if (threadIdx.x < 63) out[threadIdx.x] = unwritten[threadIdx.x] + 1;
}

__global__ void planted_synccheck(const int*, int* out) {
  __shared__ int values[64];
  if (threadIdx.x < 40) {  // not by all threads of the second warp
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = values[39 - threadIdx.x];
  }
}

// What the sanitizer says decides, so what CUDA says afterwards does not matter.
void run_planted(void (*kernel)(const int*, int*)) {
  int *in = nullptr, *out = nullptr;
  check(cudaMalloc(&in, 64 * sizeof(int)));
  check(cudaMalloc(&out, 63 * sizeof(int)));
  kernel<<<1, 64>>>(in, out);
  check(cudaGetLastError());
  std::printf("planted, then: %s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wish = count > 1 ? arguments[1] : "";
  const bool small = count == 3 && std::string(arguments[2]) == "small";
  const auto wishes = {"sm80", "sm90", "memcheck", "racecheck", "initcheck", "synccheck"};
  const bool known = std::find(wishes.begin(), wishes.end(), wish) != wishes.end();
  if (!known || count > 3 || (count == 3 && !small)) {
    std::fprintf(stderr,
                 "kernels_on_gpu: expected sm80 or sm90, and small or nothing; or the name "
                 "of a tool: memcheck, racecheck, initcheck, synccheck\n");
    return 2;
  }
  std::string reason = why_no_gpu();
  if (reason.empty() && (wish == "sm80" || wish == "sm90")) reason = why_not_here(wish);
  if (!reason.empty()) {
    std::fprintf(stderr, "kernels_on_gpu: %s\n", reason.c_str());
    return 2;
  }
  try {
    if (wish == "sm80" || wish == "sm90") {
      run_all(wish == "sm90" ? 90 : 80, small);
      std::printf("all kernels of %s: right\n", wish.c_str());
    } else if (wish == "memcheck") {
      run_planted(planted_memcheck);
    } else if (wish == "racecheck") {
      run_planted(planted_racecheck);
    } else if (wish == "initcheck") {
      run_planted(planted_initcheck);
    } else {
      run_planted(planted_synccheck);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_on_gpu %s: %s\n", wish.c_str(), error.what());
    return 1;
  }
  return 0;
}
