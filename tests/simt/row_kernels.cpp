// The CUDA kernels that walk rows, of DoRA and embeddings, and that of quantized matrices, run by
// the emulator, as plain C functions: tests/emulated_rows.py loads them with ctypes.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels/column_scale.cu"
#include "kernels/dequantize.cu"
#include "kernels/lora_embedding.cu"
#include "kernels/sum_parts.cu"
#include "kernels/weight_norm.cu"

using namespace lora_ext;
using simt_test::guarded, simt_test::message;

namespace {

// Scratch that begins as NaN, with more of it behind, where no kernel may write.
struct Scratch {
  static constexpr size_t kMargin = 4096;
  std::vector<std::vector<float>> blocks;

  static void* allocate(void* context, int64_t bytes) {
    if (simt::options().limits_only) return context;  // of any size: no kernel reads it
    auto& blocks = static_cast<Scratch*>(context)->blocks;
    return blocks.emplace_back(static_cast<size_t>(bytes / 4) + kMargin, NAN).data();
  }
  Allocator allocator() { return {allocate, this}; }

  void check() const {
    for (const std::vector<float>& block : blocks) {
      const auto intact = [](float value) { return std::isnan(value); };
      if (!std::all_of(block.end() - kMargin, block.end(), intact)) {
        throw simt::Error("a kernel wrote outside of its scratch");
      }
    }
  }
};

// f with the types named "bf16", "fp16" or "fp32"
template <class F>
void with_base(const std::string& type, const F& f) {
  if (type == "bf16") return f(Bf16{});
  if (type == "fp16") return f(Fp16{});
  f(float{});
}

// And those of the adapters: "bf16", "bf16-fp32", "fp16", "fp16-fp32" or "fp32"
template <class F>
void with_types(const std::string& types, const F& f) {
  const size_t base = types.find('-');
  with_base(types.substr(0, base), [&](auto type) {
    if (base == std::string::npos) return f(type, type);
    f(type, float{});
  });
}

}  // namespace

extern "C" {

const char* last_error() { return message().c_str(); }

// As in lora_linear.cpp: 0 eager, 1 deferred, 2 random.
void set_schedule(int completion, uint64_t seed) {
  simt::options().copies = static_cast<simt::Completion>(completion);
  simt::options().seed = seed;
}

void set_gpu(int capability, int multiprocessors) {
  simt::options().compute_capability = capability;
  simt::options().multiprocessors = multiprocessors;
}

// Launches are checked against the GPU's limits, and no kernel runs.
void set_limits_only(bool value) { simt::options().limits_only = value; }

struct WeightNormArguments {
  int64_t N, K, stride, rank;
  float scaling;
  int by_column;
  const void *weight, *lora_A, *lora_B;
  float* norms;
};

int weight_norm(const char* types, const WeightNormArguments* a) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      using T = decltype(base);
      using TA = decltype(adapter);
      Scratch scratch;
      run_weight_norm(
          WeightNormCall<T, TA>{{static_cast<const T*>(a->weight), a->N, a->K, a->stride},
                                static_cast<const TA*>(a->lora_A),
                                static_cast<const TA*>(a->lora_B),
                                static_cast<int>(a->rank),
                                a->scaling,
                                a->by_column != 0,
                                a->norms},
          scratch.allocator(), nullptr);
      scratch.check();
    });
  });
}

struct ColumnScaleArguments {
  int64_t M, N, z_stride, dy_stride;
  const void *z, *dy;
  const float *scale, *bias;
  void *y, *dz;
  float *dscale, *dbias;
};

int column_scale(const char* type, const ColumnScaleArguments* a) {
  return guarded([&] {
    with_base(type, [&](auto base) {
      using T = decltype(base);
      run_column_scale(ColumnScaleCall<T>{{static_cast<const T*>(a->z), a->M, a->N, a->z_stride},
                                          a->scale,
                                          a->bias,
                                          static_cast<T*>(a->y)},
                       nullptr);
    });
  });
}

int column_scale_backward(const char* type, const ColumnScaleArguments* a) {
  return guarded([&] {
    with_base(type, [&](auto base) {
      using T = decltype(base);
      Scratch scratch;
      run_column_scale_backward(
          ColumnScaleBackwardCall<T>{{static_cast<const T*>(a->dy), a->M, a->N, a->dy_stride},
                                     {static_cast<const T*>(a->z), a->M, a->N, a->z_stride},
                                     a->scale,
                                     static_cast<T*>(a->dz),
                                     a->dscale,
                                     a->dbias},
          scratch.allocator(), nullptr);
      scratch.check();
    });
  });
}

struct EmbeddingArguments {
  int64_t M, V, D, stride, rank;
  float scaling;
  const int64_t* tokens;
  const void *weight, *lora_A, *lora_B;
  void* y;
};

int lora_embedding(const char* types, const EmbeddingArguments* a) {
  return guarded([&] {
    with_types(types, [&](auto base, auto adapter) {
      using T = decltype(base);
      using TA = decltype(adapter);
      run_lora_embedding(
          EmbeddingCall<T, TA>{a->tokens,
                               a->M,
                               {static_cast<const T*>(a->weight), a->V, a->D, a->stride},
                               static_cast<const TA*>(a->lora_A),
                               static_cast<const TA*>(a->lora_B),
                               static_cast<int>(a->rank),
                               a->scaling,
                               static_cast<T*>(a->y)},
          nullptr);
    });
  });
}

struct BlockArguments {
  const void* values;
  const uint8_t* codes;
  const float* codebook;
  int64_t block_size;
  int type, has_offset;
  float offset;

  BlockNumbers numbers() const {
    return {values, static_cast<QuantFloat>(type), codes, codebook, block_size, has_offset != 0,
            offset};
  }
};
struct DequantizeArguments {
  int64_t N, K, block_size;
  int packing, rounding;
  float factor;
  const uint8_t* codes;
  const float* codebook;
  const int8_t* zero_point;
  void* values;
  BlockArguments scales, shift;
};

int dequantize(const char* type, const DequantizeArguments* a) {
  return guarded([&] {
    const QuantizedMatrix matrix{a->N,
                                 a->K,
                                 a->codes,
                                 a->codebook,
                                 static_cast<QuantPacking>(a->packing),
                                 a->block_size,
                                 a->scales.numbers(),
                                 a->shift.numbers(),
                                 a->zero_point,
                                 a->factor,
                                 static_cast<QuantFloat>(a->rounding)};
    with_base(type, [&](auto base) {
      using T = decltype(base);
      lora_ext::dequantize(DequantizeCall<T>{matrix, static_cast<T*>(a->values)}, nullptr);
    });
  });
}
}
