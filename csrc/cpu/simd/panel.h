// The scratch of one thread: a panel of rows is processed in column chunks that stay in the L2
// cache.
#pragma once

#include "../../common/dropout.h"
#include "types.h"

namespace lora_ext::LORA_EXT_ISA {

// 48 is a multiple of every row tile of gemm.h (24, 12, 6, 4); 1024 columns in float make the panel
// 200 KiB. The padding keeps rows from sharing a cache set.
constexpr int64_t kPanelRows = 48;
constexpr int64_t kChunkColumns = 1024;
constexpr int64_t kPanelStride = kChunkColumns + 16;

template <class S>
struct Panel {
  S* in;           // [kPanelRows, kPanelStride]
  S* out;          // [kPanelRows, kPanelStride]
  S* h;            // [kPanelRows, r]
  S* dh;           // [kPanelRows, r]
  uint16_t* keep;  // [kPanelRows, ceil(K / 128) * 8]

  Panel(void* scratch, int64_t r) {
    in = static_cast<S*>(scratch);
    out = in + kPanelRows * kPanelStride;
    h = out + kPanelRows * kPanelStride;
    dh = h + kPanelRows * r;
    keep = reinterpret_cast<uint16_t*>(dh + kPanelRows * r);
  }

  static int64_t bytes(int64_t K, int64_t r) {
    const int64_t keep_bytes = (K + kDropoutBlock - 1) / kDropoutBlock * kDropoutSlots * 2;
    return kPanelRows * ((2 * kPanelStride + 2 * r) * static_cast<int64_t>(sizeof(S)) + keep_bytes);
  }
};

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

}  // namespace lora_ext::LORA_EXT_ISA
