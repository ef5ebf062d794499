// The small CUDA kernels that are called by themselves, run by the emulator, as plain C functions:
// tests/test_small_kernels.py loads them with ctypes.
#include <string>

#include "kernels/dropout.cu"
#include "kernels/merge.cu"

using namespace lora_ext;

extern "C" {

// `captured`: seed and offset are read through the pointers, as while a CUDA graph is captured.
void fill_rng(int captured, uint64_t seed, uint64_t offset, const int64_t* seed_pointer,
              const int64_t* offset_pointer, uint32_t offset_in_graph, int64_t* state) {
  lora_ext::fill_rng_state(
      {captured != 0, seed, offset, seed_pointer, offset_pointer, offset_in_graph}, state, nullptr);
}

void dropout_mask(const int64_t* rng_state, uint32_t threshold, int64_t first_row, int64_t rows,
                  int64_t columns, bool* keep) {
  lora_ext::dropout_mask(rng_state, threshold, first_row, rows, columns, keep, nullptr);
}

// types: "bf16", "bf16-fp32", "fp16", "fp16-fp32" or "fp32"
void merge(const char* types, void* weight, int64_t N, int64_t K, int64_t stride,
           const void* lora_A, const void* lora_B, int rank, float scaling, int write,
           int* finite) {
  const auto run = [&](auto base, auto adapter) {
    using T = decltype(base);
    using TA = decltype(adapter);
    lora_ext::merge(
        MergeCall<T, TA>{static_cast<T*>(weight), N, K, stride, static_cast<const TA*>(lora_A),
                         static_cast<const TA*>(lora_B), rank, scaling, write != 0, finite},
        nullptr);
  };
  const std::string name = types;
  if (name == "bf16") return run(Bf16{}, Bf16{});
  if (name == "bf16-fp32") return run(Bf16{}, float{});
  if (name == "fp16") return run(Fp16{}, Fp16{});
  if (name == "fp16-fp32") return run(Fp16{}, float{});
  run(float{}, float{});
}
}
