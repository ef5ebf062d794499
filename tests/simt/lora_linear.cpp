// lora_linear on the CUDA kernels, run by the emulator, as plain C functions: tests/test_kernels.py
// loads them with ctypes and passes the addresses of CPU tensors.
#include <string>
#include <vector>

#if !defined(SM80_BF16_ONLY)  // compiled in a third of the time
#define LORA_EXT_SM90
#include "kernels/launch_low_rank_sm90.h"
#include "kernels/launch_product_sm90.h"
#endif
#include "cuda/lora_linear_multi_path.h"
#include "kernels/launch_low_rank_sm80.h"
#include "kernels/launch_product_sm80.h"
#include "kernels/lora_linear_grouped_run.h"
#include "kernels/lora_linear_multi_run.h"
#include "kernels/self_check.h"
#include "kernels/write_table.cu"
#include "launched.h"

using namespace lora_ext;
using simt_test::guarded, simt_test::message, simt_test::Scratch;

namespace {

#if defined(LORA_EXT_SM90)
constexpr bool kSm90 = true;
#else
constexpr bool kSm90 = false;
#endif

CudaWish& wish() {
  static CudaWish value = CudaWish::Fused;
  return value;
}

// Of the last call.
CudaPath& path() {
  static CudaPath value{};
  return value;
}

struct Arguments {
  int64_t M, N, K;
  int64_t ldx, ldy, ldw;  // of x, dy and the weight
  int r;
  int transposed;  // the weight lies as [K, N]
  float scaling;
  int dropout;
  uint32_t threshold;
  float survivor;
  const int64_t* rng_state;
  const float *scaling_factor, *bias, *saved_h;
  const void *x, *weight, *lora_A, *lora_B, *dy;
  void *y, *dx, *dA, *dB;
  float* h;
};

template <class T>
Weight<T> weight_of(const Arguments& a) {
  const bool wanted = path().kernels == CudaPath::Kernels::Fused;
  const auto* data = wanted ? static_cast<const T*>(a.weight) : nullptr;
  if (a.transposed) return {{data, a.K, a.N, a.ldw}, true};
  return {{data, a.N, a.K, a.ldw}, false};
}

template <class T, class TA>
CudaCall cuda_call(const Arguments& a, bool backward) {
  Rows rows = rows_of_sizes(a.N, a.K);
  const auto read = [&](const void* data, int64_t count, int64_t stride, int64_t columns) {
    if (data) rows = std::min(rows, rows_of(data, count, stride, columns));
  };
  if (backward) read(a.dy, a.M, a.ldy, a.N);
  read(a.x, a.M, a.ldx, a.K);
  read(a.weight, a.transposed ? a.K : a.N, a.ldw, a.transposed ? a.N : a.K);
  const int64_t r = std::max(a.r, 1);  // as if there were an adapter
  return {.backward = backward,
          .device = 0,
          .M = a.M,
          .N = a.N,
          .K = a.K,
          .r = r,
          .base = 0,
          .adapter = !std::is_same_v<T, TA>,
          .half = true,
          .dropout = a.dropout != 0,
          .rows = rows,
          .transposed = a.transposed != 0,
          .aligned_A = reinterpret_cast<uintptr_t>(a.lora_A) % 16 == 0};
}

CudaPath choose(const CudaCall& call) {
  path() = choose_cuda_path({call, simt::options().compute_capability, true, kSm90, wish(), {}});
  return path();
}
// As csrc/cuda/lora_linear.cpp chooses on the GPU of simt::options(); false: no kernel runs.
template <class T, class TA>
bool choose(const Arguments& a, bool backward) {
  return choose(cuda_call<T, TA>(a, backward)).kernels != CudaPath::Kernels::Composed;
}

template <class T, class TA>
ForwardCall<T, TA> forward_call(const Arguments& a) {
  return {{static_cast<const T*>(a.x), a.M, a.K, a.ldx},
          weight_of<T>(a),
          a.bias,
          static_cast<const TA*>(a.lora_A),
          static_cast<const TA*>(a.lora_B),
          a.r,
          a.scaling,
          a.scaling_factor,
          {a.dropout != 0, a.threshold, a.survivor, a.rng_state},
          static_cast<T*>(a.y),
          a.h};
}

template <class T, class TA>
void forward(const Arguments& a) {
  if (!choose<T, TA>(a, false)) return;
  Scratch scratch;
  lora_ext::run_forward(forward_call<T, TA>(a), {Scratch::allocate, &scratch}, nullptr,
                        path().family);
}

template <class T, class TA>
BackwardCall<T, TA> backward_call(const Arguments& a) {
  return {{static_cast<const T*>(a.dy), a.M, a.N, a.ldy},
          {static_cast<const T*>(a.x), a.M, a.K, a.ldx},
          weight_of<T>(a),
          a.saved_h,
          static_cast<const TA*>(a.lora_A),
          static_cast<const TA*>(a.lora_B),
          a.r,
          a.scaling,
          a.scaling_factor,
          {a.dropout != 0, a.threshold, a.survivor, a.rng_state},
          static_cast<T*>(a.dx),
          static_cast<TA*>(a.dA),
          static_cast<TA*>(a.dB)};
}

template <class T, class TA>
void backward(const Arguments& a) {
  if (!choose<T, TA>(a, true)) return;
  Scratch scratch;
  lora_ext::run_backward(backward_call<T, TA>(a), {Scratch::allocate, &scratch}, nullptr,
                         path().family);
}

template <class T, class TA>
CudaMultiChoice choose_together(const Arguments* layers, int count, bool backward) {
  std::vector<CudaMultiLayer> facts;
  for (const Arguments& a : std::span(layers, static_cast<size_t>(count))) {
    const CudaCall call = cuda_call<T, TA>(a, backward);
    facts.push_back({call, a.r > 0, choose(call), false, false});
  }
  return choose_cuda_multi(facts);
}

// Layers of one x, all of which have to run together.
template <class T, class TA>
void multi(const Arguments* layers, int count, bool backward) {
  for (const char* why : choose_together<T, TA>(layers, count, backward).alone) {
    if (why != nullptr) throw simt::Error(std::string("alone: ") + why);
  }
  // By the path that was chosen
  std::vector<ForwardCall<T, TA>> forwards;
  std::vector<BackwardCall<T, TA>> backwards;
  for (const Arguments& a : std::span(layers, static_cast<size_t>(count))) {
    forwards.push_back(forward_call<T, TA>(a)), backwards.push_back(backward_call<T, TA>(a));
  }
  Scratch scratch;
  const Allocator allocator{Scratch::allocate, &scratch};
  if (backward) {
    run_multi_backward<T, TA>(backwards, allocator, nullptr, path().family);
  } else {
    run_multi_forward<T, TA>(forwards, allocator, nullptr, path().family);
  }
}

// dh takes h's place.
template <class T, class TA>
void up_grad(const Arguments& a) {
  if (!choose<T, TA>(a, true)) return;
  Scratch scratch;
  const UpGradCall<T, TA> call{{static_cast<const T*>(a.dy), a.M, a.N, a.ldy},
                               a.saved_h,
                               static_cast<const TA*>(a.lora_B),
                               a.r,
                               a.scaling,
                               a.h,
                               static_cast<TA*>(a.dB)};
  lora_ext::run_up_grad(call, {Scratch::allocate, &scratch}, nullptr, path().family);
}

// f with the types named "bf16", "bf16-fp32", "fp16" or "fp16-fp32"
template <class F>
void with_types(const std::string& types, const F& f) {
#if !defined(FP16_ONLY)  // compiled in half of the time
  if (types == "bf16") return f(Bf16{}, Bf16{});
  if (types == "bf16-fp32") return f(Bf16{}, float{});
#endif
#if !defined(SM80_BF16_ONLY)
  if (types == "fp16") return f(Fp16{}, Fp16{});
  if (types == "fp16-fp32") return f(Fp16{}, float{});
#endif
  throw simt::Error("built for a base of another type");
}

}  // namespace

extern "C" {

// 0, or 1 and last_error() says why.
int lora_forward(const char* types, const Arguments* arguments) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      forward<decltype(base), decltype(adapter)>(*arguments);
    });
  });
}

int lora_backward(const char* types, const Arguments* arguments) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      backward<decltype(base), decltype(adapter)>(*arguments);
    });
  });
}

int lora_up_grad(const char* types, const Arguments* arguments) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      up_grad<decltype(base), decltype(adapter)>(*arguments);
    });
  });
}

int lora_multi(const char* types, const Arguments* layers, int count, int is_backward) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      multi<decltype(base), decltype(adapter)>(layers, count, is_backward != 0);
    });
  });
}

#if !defined(FP16_ONLY)
// What csrc/kernels/self_check.h finds wrong with a family in a problem of these sizes.
const char* self_check(int family, int64_t M, int64_t N, int64_t K) {
  Scratch scratch;
  const auto copy = [](void* to, const void* from, int64_t bytes) {
    memcpy(to, from, static_cast<size_t>(bytes));
  };
  try {
    SelfCheck check({M, N, K}, {Scratch::allocate, &scratch}, copy);
    message() = check.run(static_cast<KernelFamily>(family), nullptr);
  } catch (const std::exception& error) {
    message() = error.what();
  }
  return message().c_str();
}

#endif

// What LORA_EXT_CUDA_PATH asks for, by its number in CudaWish.
void set_wish(int value) { wish() = static_cast<CudaWish>(value); }

// Why it has that path.
const char* last_reason() { return path().reason; }

// Of layers of one x, for a direction: why each has a call of its own, "" where it runs with
// others.
int lora_multi_alone(const char* types, const Arguments* layers, int count, int is_backward,
                     const char** out) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      const auto choice =
          choose_together<decltype(base), decltype(adapter)>(layers, count, is_backward != 0);
      for (int i = 0; i < count; ++i) {
        const char* const why = choice.alone[static_cast<size_t>(i)];
        out[i] = why == nullptr ? "" : why;
      }
    });
  });
}

// As `explain` tells the path of the last call.
const char* last_path() { return cuda_path_name(path()); }
}
