// Which kernels run a call, for those who choose: nothing of the kernels themselves.
#pragma once

namespace lora_ext {

// For GPUs from sm_80 on; and with TMA and wgmma for sm_90a, which read what Rows::Tma of
// cuda/lora_linear_path.h says.
enum class KernelFamily { Sm80, Sm90 };

}  // namespace lora_ext
