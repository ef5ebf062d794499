"""What `make cuda-check` runs: the installed CUDA build, on a machine that may have no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import nn

import lora_ext
from lora_ext._extension import _C

info = lora_ext.build_info()
assert info["cuda"] == torch.version.cuda, info
for operator in ("lora_linear_fwd", "lora_linear_bwd", "draw_rng_state", "dropout_mask", "merge_"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{operator}", "CUDA"), operator

x, weight, lora_A, lora_B = (torch.randn(size) for size in ((5, 8), (6, 8), (2, 8), (6, 2)))
y = lora_ext.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0)
torch.testing.assert_close(y, x @ weight.t() + 2.0 * x @ lora_A.t() @ lora_B.t())


def gpu_paths(model: nn.Module, compute_capability: int) -> list[str]:
    """What `explain` would say of this model on such a GPU."""
    return [
        _C.explain_lora_linear_cuda(
            layer.out_features, layer.in_features, layer.r, layer.weight.dtype, compute_capability
        )[0]
        for layer in model.modules()
        if isinstance(layer, lora_ext.nn.Linear)
    ]


model = nn.Sequential(
    lora_ext.nn.Linear(64, 32, 8, dtype=torch.bfloat16, device="meta"),
    lora_ext.nn.Linear(64, 32, 8, dtype=torch.float32, device="meta"),
    lora_ext.nn.Linear(64, 32, 8),
)
assert [row.path.split()[0] for row in lora_ext.explain(model)] == ["none", "none", "cpu"]
FUSED = {"auto": "cuda fused sm_80", "fused": "cuda fused sm_80", "composed": "cuda cublas"}
assert gpu_paths(model, 80) == [FUSED[info["cuda_path"]], "cuda cublas", "cuda cublas"]
assert gpu_paths(model, 75) == ["cuda cublas"] * 3
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    told = [row.path for row in lora_ext.explain(model.to_empty(device="cuda"))]
    assert told == gpu_paths(model, 10 * major + minor), told

# The environment variable, in processes of their own since it is read once
if "LORA_EXT_CUDA_PATH" not in os.environ:
    for wish in ("fused", "composed"):
        environment = os.environ | {"LORA_EXT_CUDA_PATH": wish}
        subprocess.run([sys.executable, __file__], env=environment, check=True)
    environment = os.environ | {"LORA_EXT_CUDA_PATH": "fast"}
    refused = subprocess.run([sys.executable, __file__], env=environment, stderr=subprocess.PIPE)
    assert b"LORA_EXT_CUDA_PATH: got 'fast', expected 'auto', 'fused'" in refused.stderr, refused

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
print(
    f"lora_ext {info['version']}: CUDA {info['cuda']} build imported, path {info['cuda_path']}, "
    f"CPU path right; {gpu}"
)
