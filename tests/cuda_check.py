"""What `make cuda-check` runs: the installed CUDA build, on a machine that may have no GPU."""

from __future__ import annotations

import torch

import lora_ext

info = lora_ext.build_info()
assert info["cuda"] == torch.version.cuda, info
for operator in ("lora_linear_fwd", "lora_linear_bwd", "draw_rng_state", "dropout_mask", "merge_"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{operator}", "CUDA"), operator

x, weight, lora_A, lora_B = (torch.randn(size) for size in ((5, 8), (6, 8), (2, 8), (6, 2)))
y = lora_ext.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0)
torch.testing.assert_close(y, x @ weight.t() + 2.0 * x @ lora_A.t() @ lora_B.t())
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
print(f"lora_ext {info['version']}: CUDA {info['cuda']} build imported, CPU path right; {gpu}")
