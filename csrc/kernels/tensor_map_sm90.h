// Matrices as TMA reads them. Host code without torch.
#pragma once

#include <array>
#include <memory>

#include "arch/arch.h"
#include "lora_linear_passes.h"

namespace lora_ext::sm90 {

// All that a map is made of: two that are equal here have the same map, whatever lies there now.
struct TensorMapKey {
  const void* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;
  arch::Swizzle swizzle;

  bool operator==(const TensorMapKey&) const = default;

  size_t hash() const {
    auto mixed = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data));
    const int64_t box = (int64_t{box_rows} << 32) + box_columns * 8 + static_cast<int>(swizzle);
    for (const int64_t part : {rows, columns, stride, box}) {
      mixed = (mixed ^ static_cast<uint64_t>(part)) * 0x9E3779B97F4A7C15u;
    }
    return static_cast<size_t>(mixed >> 32);
  }
};

// Maps that this thread made before, since the driver takes a while for each; a weight's is needed
// in every call. Where two meet in one place, the later one stays.
class TensorMaps {
 public:
  template <class Make>
  const arch::TensorMap& get(const TensorMapKey& key, const Make& make) {
    Entry& entry = entries_[key.hash() % kEntries];
    if (!(entry.key == key)) {
      entry.key = {};  // if make throws
      entry.map = make();
      entry.key = key;
    }
    return entry.map;
  }

  static TensorMaps& of_this_thread() {
    static thread_local const auto maps = std::make_unique<TensorMaps>();
    return *maps;
  }

 private:
  static constexpr size_t kEntries = 1024;
  struct Entry {
    TensorMapKey key{};  // of no rows: no matrix's
    arch::TensorMap map;
  };
  std::array<Entry, kEntries> entries_{};
};

template <class T>
arch::TensorMap tensor_map(const Matrix<T>& matrix, int box_rows, int box_columns,
                           arch::Swizzle swizzle) {
  static_assert(sizeof(T) == 2, "the key knows no other size");
  // To the next row, which a single row does not have: but the driver checks it.
  const int64_t stride = matrix.rows == 1 ? (matrix.columns + 7) / 8 * 8 : matrix.stride;
  const TensorMapKey key{matrix.data, matrix.rows, matrix.columns, stride,
                         box_rows,    box_columns, swizzle};
  return TensorMaps::of_this_thread().get(key, [&] {
    arch::TensorMap map;
    const int error = arch::encode_tensor_map(map, matrix.data, matrix.rows, matrix.columns, stride,
                                              box_rows, box_columns, swizzle);
    if (error != 0) {
      throw std::runtime_error("lora_ext: the CUDA driver made no tensor map: error " +
                               std::to_string(error));
    }
    return map;
  });
}

}  // namespace lora_ext::sm90
