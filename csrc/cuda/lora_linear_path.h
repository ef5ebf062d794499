// How the CUDA backend runs a call. It is decided here, from facts alone: so `explain` can say what
// a call would do, and tests reach every branch without a GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>

#include "kernels/family.h"

namespace lora_ext {

// What LORA_EXT_CUDA_PATH asks for: the choice of choose_cuda_path; the kernels of csrc/kernels for
// everything, or for all but the base product, wherever they can run; or never those.
enum class CudaWish { Auto, Fused, Hybrid, Composed };

// Their names, in the order of CudaWish: of those that are measured the first is taken where the
// clock sees no difference. build_info()["cuda_paths"] is this list, in every build.
struct CudaPathName {
  const char* name;
  const char* asked;  // the reason for a path that the environment asks for
};
constexpr CudaPathName kCudaPaths[] = {{"auto", "LORA_EXT_CUDA_PATH=auto"},
                                       {"fused", "LORA_EXT_CUDA_PATH=fused"},
                                       {"hybrid", "LORA_EXT_CUDA_PATH=hybrid"},
                                       {"composed", "LORA_EXT_CUDA_PATH=composed"}};

inline const CudaPathName& name_of(CudaWish wish) { return kCudaPaths[static_cast<int>(wish)]; }

inline std::optional<CudaWish> cuda_wish_named(std::string_view name) {
  for (size_t i = 0; i < std::size(kCudaPaths); ++i) {
    if (name == kCudaPaths[i].name) return static_cast<CudaWish>(i);
  }
  return std::nullopt;
}

// How the rows of 16-bit matrices lie: what may read them. Each allows what those before it allow.
enum class Rows {
  Any,      // element by element
  Aligned,  // 16 bytes at a time: rows begin at multiples of 16 bytes
  Tma       // and do not overlap
};

// Of one matrix, whose rows are `stride` elements apart; a single row is as far as it likes.
inline Rows rows_of(const void* data, int64_t rows, int64_t stride, int64_t columns) {
  constexpr int64_t kMostTmaStride = (int64_t{1} << 39) - 1;  // it counts bytes in 40 bits
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return Rows::Any;
  if (rows <= 1) return Rows::Tma;
  if (stride % 8 != 0) return Rows::Any;
  return stride >= columns && stride <= kMostTmaStride ? Rows::Tma : Rows::Aligned;
}

// Of all matrices of a call, if they are contiguous: y has rows of N, x of K elements.
inline Rows rows_of_sizes(int64_t N, int64_t K) {
  return N % 8 == 0 && K % 8 == 0 ? Rows::Tma : Rows::Any;
}

struct CudaCall {
  bool backward;
  int device;
  int64_t M, N, K, r;
  int base, adapter;  // at::ScalarType
  bool half;          // base is bf16 or fp16
  bool dropout;
  Rows rows;                // of the worst among x, dy, the weight and the results
  bool transposed = false;  // the weight lies as [K, N]
  bool aligned_A = true;    // lora_A begins at a multiple of 16 bytes, as few rows' kernel reads it
};

// Whether code for these targets of a build ("80 90a-real", as CMake names them) runs on a GPU:
// machine code for later GPUs of the same generation, PTX (without -real) for all later ones; with
// a letter for one GPU, or one generation, alone.
inline bool built_for(std::string_view targets, int compute_capability) {
  while (!targets.empty()) {
    const std::string_view target = targets.substr(0, targets.find(' '));
    targets.remove_prefix(std::min(targets.size(), target.size() + 1));
    int number = 0;
    size_t end = 0;
    while (end < target.size() && target[end] >= '0' && target[end] <= '9') {
      number = 10 * number + (target[end++] - '0');
    }
    if (number == 0 || number > compute_capability) continue;
    const char letter = end < target.size() ? target[end] : '\0';
    const bool machine_code = number / 10 == compute_capability / 10;
    const bool ptx = letter != 'a' && letter != 'f' && target.find("-real") == target.npos;
    if (letter == 'a' ? number == compute_capability : machine_code || ptx) return true;
  }
  return false;
}

struct CudaProblem {
  CudaCall call;
  int compute_capability;           // 80 for sm_80
  bool built;                       // this build has kernels for such a GPU
  bool sm90;                        // this build has the kernels of sm_90a
  CudaWish wish;                    // of the environment
  std::optional<CudaWish> fastest;  // of those that autotune measured for this call
};

struct CudaPath {
  // ATen's products (cuBLAS) for everything; for the base product alone, added to what the kernels
  // made; or the kernels for everything.
  enum class Kernels { Composed, Hybrid, Fused };
  Kernels kernels;
  KernelFamily family;  // of the kernels, if any run
  const char* reason;   // for that choice
};

// Why the kernels of csrc/kernels cannot run a call; null where they can.
inline const char* why_no_kernels(const CudaCall& call, int compute_capability, bool built) {
  constexpr int64_t kMaxRank = 1024;
  constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;
  if (!call.half) return "float32 and float64 products are cuBLAS's";
  if (compute_capability < 80) return "the kernels need a GPU from sm_80 on";
  if (!built) {
    return "this build has no kernels for this GPU: add its number to TORCH_CUDA_ARCH_LIST and "
           "install lora_ext again";
  }
  if (call.r == 0 || call.r > kMaxRank) return "the kernels take ranks 1 to 1024";
  if (call.N == 0 || call.K == 0) return "the kernels take no empty matrices";
  if (std::max({call.M, call.N, call.K}) > kMostRows) {
    return "the kernels count rows and columns in 32 bits";
  }
  return nullptr;
}

// What follows is predicted (benchmarks/predict.py), until it is measured.

// Whether cuBLAS makes the base product beside the kernels for sm_90a. They have no part of K
// alone: fewer tiles of 128 x 128 than multiprocessors leave some of them idle and do not hide the
// latency of their reads, where cuBLAS splits K.
inline bool few_tiles(const CudaCall& call) {
  constexpr int64_t kTile = 128, kMultiprocessors = 128;
  const auto tiles = [](int64_t size) { return (size + kTile - 1) / kTile; };
  return tiles(call.M) * tiles(std::min(call.N, call.K)) < kMultiprocessors;
}

constexpr int64_t kWideRank = 256;  // beyond it cuBLAS's products have tiles for all of the rank
constexpr int64_t kFewest =
    16;  // rows that wait for launches and for the weight, whatever the rest

// Whether cuBLAS's low-rank products are no slower than the kernels' passes. Few rows wait for
// launches, of which the kernels for sm_90a have more where a rank or a float adapter is in several
// parts. Those for sm_80 pay where they save a reading of x: dropout's, or of a float copy.
inline bool blas_keeps_up(const CudaCall& call, KernelFamily family) {
  constexpr int64_t kFewRows = 512;
  const bool mixed = call.adapter != call.base, fewest = call.M <= kFewest;
  const bool sm90 = family == KernelFamily::Sm90;
  if (call.r > kWideRank) {
    // A pass over x and one over dy for every 128 ranks, or 64: what they save has to be more.
    const bool masks = call.dropout && !(call.r > 2 * kWideRank && call.M <= 2 * kFewRows);
    if (!sm90 || call.M <= 128 || !(mixed || masks)) return true;
  }
  if (sm90) {
    const bool wide = call.r > (call.M <= 64 ? 32 : 64);
    return few_tiles(call) && !call.dropout && (mixed ? fewest : wide);
  }
  const bool few = call.M <= kFewRows, saves = call.dropout || (mixed && !few);
  return !saves || fewest || (few && call.r > 64);
}

// One way to run a call that the kernels can run, and when it is taken.
struct CudaCandidate {
  bool fits;
  CudaWish path;
  const char* reason;
};

// The kernels for sm_90a read by TMA alone, and store 16 bytes at a time.
inline KernelFamily family_for(const CudaProblem& problem) {
  const bool sm90 =
      problem.sm90 && problem.compute_capability == 90 && problem.call.rows == Rows::Tma;
  return sm90 ? KernelFamily::Sm90 : KernelFamily::Sm80;
}

// All candidates: the first that fits is taken, and the last one always fits.
inline std::array<CudaCandidate, 9> cuda_candidates(const CudaProblem& problem) {
  const CudaCall& call = problem.call;
  const int capability = problem.compute_capability;
  const bool asked = problem.wish != CudaWish::Auto, measured = problem.fastest.has_value();
  const bool unaligned = call.rows == Rows::Any;
  const bool sm80 = family_for(problem) == KernelFamily::Sm80;
  // Tensor cores of sm_90 and of sm_100 to sm_110 run at their rate for instructions of their own.
  const bool slow_mma = sm80 && capability >= 90 && capability < 120;
  const bool few = few_tiles(call);
  const bool few_rows = !call.backward && !call.transposed && call.aligned_A &&
                        (!slow_mma || call.M <= kFewest) &&
                        few_rows_fit(call.M, call.N, call.r, call.adapter != call.base,
                                     call.dropout, few_rows_family(family_for(problem)));
  return {{
      {asked, problem.wish, name_of(problem.wish).asked},
      {measured, problem.fastest.value_or(CudaWish::Auto),
       "the fastest that autotune measured on this GPU"},
      // Vocabularies are often of such sizes. The kernels would read element by element, each read
      // waiting for the one before.
      {unaligned, CudaWish::Composed,
       "rows that begin at no multiple of 16 bytes, as where N or K is no multiple of 8, are "
       "cuBLAS's"},
      {few_rows, CudaWish::Fused, "few rows without dropout: one kernel makes h and y"},
      {blas_keeps_up(call, family_for(problem)), CudaWish::Composed,
       "cuBLAS's low-rank products are predicted to be as fast as the kernels for such a call"},
      {slow_mma, CudaWish::Hybrid,
       "mma.sync is slow on this GPU: cuBLAS makes the base product, kernels the rest"},
      // All warps of a multiprocessor's one block wait for each step: predicted at 77 to 94 % of
      // cuBLAS on an A100 (benchmarks/predict.py), so that it needs a measurement before it is
      // anyone's default.
      {sm80, CudaWish::Hybrid,
       "the base product of the kernels for sm_80 is not measured yet: cuBLAS makes it, kernels "
       "the rest"},
      {few, CudaWish::Hybrid,
       "a small result: cuBLAS makes the base product, which it can split along K, kernels the "
       "rest"},
      {true, CudaWish::Fused,
       "one pass over x and one over dy, low-rank products inside the base product's kernel"},
  }};
}

inline CudaPath choose_cuda_path(const CudaProblem& problem) {
  using Kernels = CudaPath::Kernels;
  if (const char* reason =
          why_no_kernels(problem.call, problem.compute_capability, problem.built)) {
    return {Kernels::Composed, KernelFamily::Sm80, reason};
  }
  const auto candidates = cuda_candidates(problem);
  const auto& winner = *std::find_if(candidates.begin(), candidates.end(),
                                     [](const CudaCandidate& candidate) { return candidate.fits; });
  const Kernels kernels = winner.path == CudaWish::Composed ? Kernels::Composed
                          : winner.path == CudaWish::Hybrid ? Kernels::Hybrid
                                                            : Kernels::Fused;
  return {kernels, family_for(problem), winner.reason};
}

inline const char* cuda_path_name(const CudaPath& path) {
  const bool sm90 = path.family == KernelFamily::Sm90;
  switch (path.kernels) {
    case CudaPath::Kernels::Fused:
      return sm90 ? "cuda fused sm_90a" : "cuda fused sm_80";
    case CudaPath::Kernels::Hybrid:
      return sm90 ? "cuda hybrid sm_90a" : "cuda hybrid sm_80";
    default:
      return "cuda cublas";
  }
}

}  // namespace lora_ext
