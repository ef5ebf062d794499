// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC'11). Host and device code; the vectorised CPU version in cpu/simd repeats these
// rounds lane by lane and a test holds the two equal.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORA_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: these files are also compiled for instruction sets that not every CPU has.
#define LORA_EXT_HOST_DEVICE static inline
#endif

namespace lora_ext {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  uint32_t word[4];
};

// Its word `index`, without indexing: registers of a GPU have no addresses.
LORA_EXT_HOST_DEVICE uint32_t word_of(const PhiloxBlock& block, int index) {
  return index < 2 ? (index == 0 ? block.word[0] : block.word[1])
                   : (index == 2 ? block.word[2] : block.word[3]);
}

// 32 x 32 to 64 bits. Of the expression nvcc makes an addition of zero more, in each of 20
// products.
LORA_EXT_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;\n" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

LORA_EXT_HOST_DEVICE PhiloxBlock philox_round(const PhiloxBlock& counter, uint32_t key0,
                                              uint32_t key1) {
  const uint64_t product0 = wide_product(kPhiloxMultiplier0, counter.word[0]);
  const uint64_t product1 = wide_product(kPhiloxMultiplier1, counter.word[2]);
  return {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
           static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
           static_cast<uint32_t>(product0)}};
}

// The 128 random bits that belong to `counter` under the 64-bit key (key0, key1).
LORA_EXT_HOST_DEVICE PhiloxBlock philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return counter;
}

// The same by the keys of all rounds, for who draws so often that adding them up counts.
struct PhiloxKeys {
  uint32_t round[kPhiloxRounds][2];
};
LORA_EXT_HOST_DEVICE PhiloxBlock philox(PhiloxBlock counter, const PhiloxKeys& keys) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, keys.round[round][0], keys.round[round][1]);
  }
  return counter;
}

}  // namespace lora_ext
