// choose_cpu_path and choose_cuda_path for tests/test_paths.py: what they say about the facts
// given.
#include "cpu/dora_linear_path.h"
#include "cpu/lora_linear_path.h"
#include "cuda/lora_linear_multi_path.h"
#include "cuda/lora_linear_tuned.h"

using namespace lora_ext;

struct ChosenPath {
  int kernels;
  const char* name;  // of a CUDA path
  const char* reason;
  int64_t fwd_parts, bwd_parts;  // of a CPU path, as the next
  bool widens;
};

extern "C" ChosenPath cpu_path(int64_t M, int64_t N, int64_t K, int64_t r, bool dropout, bool bf16,
                               bool bf16_dot, bool mixed, bool fast_blas, bool half,
                               bool faster_bf16, bool grouped, int64_t compute_bytes,
                               int64_t threads) {
  const CpuPath path = choose_cpu_path({M, N, K, r, dropout, bf16, bf16_dot, mixed, fast_blas, half,
                                        faster_bf16, grouped, compute_bytes, threads});
  return {static_cast<int>(path.kernels),
          nullptr,
          path.reason,
          path.fwd_parts,
          path.bwd_parts,
          path.widens};
}

extern "C" bool together(int64_t ranks, int64_t adapter_elements) {
  return pays_together(ranks, adapter_elements);
}

extern "C" ChosenPath dropped_path(int64_t M, int64_t K, double dropout_p, bool bf16,
                                   bool fast_blas) {
  const DoraLinearPath path = choose_dora_linear_path(M, K, dropout_p, bf16, fast_blas);
  return {path.skips, nullptr, path.reason, 0, 0, false};
}

extern "C" int64_t chunk_of_rows(int64_t M, int64_t K, int64_t parts, int64_t threads) {
  return rows_per_chunk(M, K, parts, threads);
}

// fastest: none if negative
static CudaProblem cuda_problem(int64_t M, int64_t N, int64_t K, int64_t r, bool half, int rows,
                                int compute_capability, bool built, bool sm90, int wish,
                                int fastest, bool dropout, bool mixed, bool transposed) {
  const CudaCall call{false,     0, M, N, K, r, 0, mixed, half, dropout, static_cast<Rows>(rows),
                      transposed};
  const auto measured = fastest < 0 ? std::nullopt : std::optional(static_cast<CudaWish>(fastest));
  return {call, compute_capability, built, sm90, static_cast<CudaWish>(wish), measured};
}

// All candidates of a problem that the kernels can run, in their order.
extern "C" int cuda_path_candidates(CudaCandidate* out, int64_t M, int64_t N, int64_t K, int64_t r,
                                    bool half, int rows, int compute_capability, bool built,
                                    bool sm90, int wish, int fastest, bool dropout, bool mixed,
                                    bool transposed) {
  const auto candidates =
      cuda_candidates(cuda_problem(M, N, K, r, half, rows, compute_capability, built, sm90, wish,
                                   fastest, dropout, mixed, transposed));
  std::copy(candidates.begin(), candidates.end(), out);
  return static_cast<int>(candidates.size());
}

extern "C" ChosenPath cuda_path(int64_t M, int64_t N, int64_t K, int64_t r, bool half, int rows,
                                int compute_capability, bool built, bool sm90, int wish,
                                int fastest, bool dropout, bool mixed, bool transposed) {
  const CudaPath path =
      choose_cuda_path(cuda_problem(M, N, K, r, half, rows, compute_capability, built, sm90, wish,
                                    fastest, dropout, mixed, transposed));
  return {static_cast<int>(path.kernels), cuda_path_name(path), path.reason, 0, 0, false};
}

extern "C" bool is_built_for(const char* targets, int compute_capability) {
  return built_for(targets, compute_capability);
}

// Of a matrix at this address, and of x, y and the weight by their sizes.
extern "C" int rows_of_matrix(int64_t address, int64_t rows, int64_t stride, int64_t columns) {
  return static_cast<int>(rows_of(reinterpret_cast<const void*>(address), rows, stride, columns));
}
extern "C" int rows_of_a_call(int64_t N, int64_t K) {
  return static_cast<int>(rows_of_sizes(N, K));
}

// What was measured, by calls of ten facts; negative: nothing.
using Facts = const int64_t (&)[10];
static CudaCall cuda_call(Facts facts) {
  return {facts[0] != 0,
          static_cast<int>(facts[1]),
          facts[2],
          facts[3],
          facts[4],
          facts[5],
          static_cast<int>(facts[6]),
          static_cast<int>(facts[7]),
          true,
          facts[8] != 0,
          static_cast<Rows>(facts[9])};
}
static TunedPaths tuned;

extern "C" void set_tuned(Facts facts, int wish) {
  tuned.set(cuda_call(facts), wish < 0 ? std::nullopt : std::optional(static_cast<CudaWish>(wish)));
}

extern "C" int find_tuned(Facts facts) {
  const auto found = tuned.find(cuda_call(facts));
  return found ? static_cast<int>(*found) : -1;
}

// Of layers of one x, each of eleven facts: why each has a call of its own, or null.
extern "C" void multi_choice(int count, const int64_t (*facts)[11], const char** alone) {
  std::vector<CudaMultiLayer> layers;
  for (int i = 0; i < count; ++i) {
    const auto& [adapted, kernels, sm90, transposed, mixed, dropout, backward, M, r, makes_h,
                 wants_nothing] = facts[i];
    CudaMultiLayer layer{};
    layer.call = {backward != 0, 0, M, 4096, 4096, r, 0, mixed != 0, true, dropout != 0, Rows::Tma};
    layer.path = {static_cast<CudaPath::Kernels>(kernels),
                  sm90 != 0 ? KernelFamily::Sm90 : KernelFamily::Sm80, "its own reason"};
    layer.adapted = adapted != 0, layer.call.transposed = transposed != 0;
    layer.makes_h = makes_h != 0, layer.wants_nothing = wants_nothing != 0;
    layers.push_back(layer);
  }
  const CudaMultiChoice choice = choose_cuda_multi(layers);
  std::copy(choice.alone.begin(), choice.alone.end(), alone);
}
