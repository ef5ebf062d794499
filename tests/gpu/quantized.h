// The kernel that dequantizes, of random codes in every packing, against the host.
#pragma once

#include <random>

#include "kernels/dequantize.h"
#include "problem.h"

namespace gpu_test {

// Code i of packed bytes, one at a time.
inline int code_of(lora_ext::QuantPacking packing, const std::vector<uint8_t>& bytes, size_t i) {
  using Packing = lora_ext::QuantPacking;
  const auto halves = [&](size_t size) {
    const int byte = bytes[i / (2 * size) * size + i % size];
    return i % (2 * size) < size ? byte & 15 : byte >> 4;
  };
  const int byte = bytes[i / 2 < bytes.size() ? i / 2 : 0];
  switch (packing) {
    case Packing::Int8:
      return static_cast<int8_t>(bytes[i]);
    case Packing::HighFirst:
      return i % 2 == 0 ? byte >> 4 : byte & 15;
    case Packing::LowFirst:
      return i % 2 == 0 ? byte & 15 : byte >> 4;
    case Packing::Halves16:
      return halves(16);
    case Packing::Halves32:
      return halves(32);
    case Packing::Q6K:
      break;
  }
  const uint8_t* const unit = bytes.data() + i / 256 * 192;
  const size_t half = i % 256 / 128, j = i % 128;
  const int low = j < 64 ? unit[half * 64 + j] & 15 : unit[half * 64 + j - 64] >> 4;
  return low | (unit[128 + half * 32 + j % 32] >> j / 32 * 2 & 3) << 4;
}

// Blocks of 48 values, most of which end within a row; numbers of blocks nested, five to one. All
// numbers are exact but the last rounding.
template <class T>
void run_dequantize() {
  constexpr int64_t kN = 24, kK = 992, kValues = kN * kK, kBlocks = kValues / 48;
  for (int p = 0; p < lora_ext::kQuantPackings; ++p) {
    const auto packing = static_cast<lora_ext::QuantPacking>(p);
    const lora_ext::QuantUnit& unit = lora_ext::unit_of(packing);
    std::mt19937 generator(static_cast<unsigned>(p));
    std::vector<uint8_t> codes(size_t(kValues / unit.codes * unit.bytes)), block_codes(kBlocks);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(generator());
    for (uint8_t& code : block_codes) code = static_cast<uint8_t>(generator());
    const auto codebook = random_values<float>(size_t{1} << unit.bits, 1);
    const auto of_blocks = random_values<float>(256, 2);
    const auto absmax = random_values<float>(size_t(kBlocks) / 5 + 1, 3);
    const bool numbers = packing == lora_ext::QuantPacking::Int8;

    Doubles want(kValues);
    for (size_t i = 0; i < want.size(); ++i) {
      const size_t block = i / 48;
      const int code = code_of(packing, codes, i);
      const double value = numbers ? code : codebook[size_t(code)];
      want[i] = value * (of_blocks[block_codes[block]] * absmax[block / 5] + 0.5) * 0.25;
    }
    Memory memory;
    T* const values = memory.fresh<T>(kValues);
    const lora_ext::BlockNumbers scales{memory.copy(absmax),
                                        lora_ext::QuantFloat::F32,
                                        memory.copy(block_codes),
                                        memory.copy(of_blocks),
                                        5,
                                        true,
                                        0.5f};
    const lora_ext::QuantizedMatrix matrix{kN,
                                           kK,
                                           memory.copy(codes),
                                           numbers ? nullptr : memory.copy(codebook),
                                           packing,
                                           48,
                                           scales,
                                           {},
                                           nullptr,
                                           0.25f,
                                           lora_ext::QuantFloat::F32};
    lora_ext::dequantize(lora_ext::DequantizeCall<T>{matrix, values}, nullptr);
    expect_close("dequantize", fetched(values, want.size()), want,
                 sizeof(T) == sizeof(float) ? 0.0 : 1.0 / 512);
  }
}

}  // namespace gpu_test
