"""What `make cuda-check` runs: the installed CUDA build, on a machine that may have no GPU; and, if
the log of the build is given, what ptxas said of its kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import lora_ext
from lora_ext._extension import _C

if len(sys.argv) > 1:
    log = Path(sys.argv[1]).read_text()
    assert f"lora_ext: CUDA {torch.version.cuda} build for torch {torch.__version__}" in log
    assert "Collecting torch" not in log, "the build fetched a torch of its own"
    for target in ("sm_80", "sm_90a"):
        assert f"for '{target}'" in log, f"no kernel was compiled for {target}"
    used = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", log)
    assert used and all(size == "0" for size, _ in used), "a kernel spills registers"
    assert "setmaxnreg' ignored" not in log
    # Of wgmma: products one after the other, and waits that the source does not have
    assert "serialized" not in log and "injected" not in log
    print(f"ptxas: {len(used) // 3} kernels, no local memory, no spilled registers")

info = lora_ext.build_info()
assert info["cuda"] == torch.version.cuda, info
OPERATORS = ("lora_linear_fwd", "lora_linear_bwd", "draw_rng_state", "dropout_mask", "merge_")
OPERATORS += ("column_scale", "column_scale_bwd", "weight_norm", "lora_embedding_fwd")
OPERATORS += ("lora_embedding_bwd", "lora_linear_grouped_fwd", "lora_linear_grouped_bwd")
for operator in OPERATORS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{operator}", "CUDA"), operator

for dtype, path in ((torch.float16, "cuda fused"), (torch.float64, "cuda aten")):
    assert _C.explain_rows_cuda(dtype)[0] == path

x, weight, lora_A, lora_B = (torch.randn(size) for size in ((5, 8), (6, 8), (2, 8), (6, 2)))
y = lora_ext.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0)
torch.testing.assert_close(y, x @ weight.t() + 2.0 * x @ lora_A.t() @ lora_B.t())


def gpu_paths(model: nn.Module, compute_capability: int) -> list[str]:
    """What `explain` would say of this model on such a GPU."""
    layers = [layer for layer in model.modules() if isinstance(layer, lora_ext.nn.Linear)]
    return [_C.explain_lora_linear_cuda(call(layer), compute_capability)[0] for layer in layers]


def call(layer: lora_ext.nn.Linear, **changed: object) -> object:
    facts: dict[str, object] = dict(backward=False, device=0, tokens=2048, dropout=True)
    facts |= dict(out_features=layer.out_features, in_features=layer.in_features, r=layer.r)
    facts |= dict(base=layer.weight.dtype, adapter=layer.lora_A.dtype)
    return _C.CudaCall(**(facts | changed))


model = nn.Sequential(
    lora_ext.nn.Linear(64, 32, 8, lora_dropout=0.1, dtype=torch.bfloat16, device="meta"),
    lora_ext.nn.Linear(64, 32, 8, lora_dropout=0.1, dtype=torch.float32, device="meta"),
    lora_ext.nn.Linear(64, 32, 8, lora_dropout=0.1),
)
assert [row.path.split()[0] for row in lora_ext.explain(model)] == ["none", "none", "cpu"]
SM80 = {"auto": "cuda hybrid sm_80", "fused": "cuda fused sm_80"}
SM80 |= {"hybrid": "cuda hybrid sm_80", "composed": "cuda cublas"}
on_80 = _C.has_cuda_kernels(call(model[0]), 80)  # `make gpu` builds for one GPU alone
if not on_80:
    SM80 = dict.fromkeys(SM80, "cuda cublas")
    assert "no kernels for this GPU" in _C.explain_lora_linear_cuda(call(model[0]), 80)[1]
assert gpu_paths(model, 80) == [SM80[info["cuda_path"]], "cuda cublas", "cuda cublas"]
assert gpu_paths(model, 75) == ["cuda cublas"] * 3
for capability, kernels in ((80, [on_80, False, False]), (75, [False] * 3)):
    assert [_C.has_cuda_kernels(call(layer), capability) for layer in model] == kernels

# How the weight lies: by columns as well as by rows, but not at an odd address
if on_80 and info["cuda_path"] == "auto":
    flat = torch.empty(32 * 64 + 1, dtype=torch.bfloat16)
    for weight, path in (
        (flat[:-1].view(32, 64), "cuda hybrid sm_80"),
        (flat[:-1].view(64, 32).t(), "cuda hybrid sm_80"),
        (flat[1:].view(32, 64), "cuda cublas"),
    ):
        told, reason = _C.explain_lora_linear_cuda(call(model[0], weight=weight), 80)
        assert told == path, (told, reason)
    plain = dict(dropout=False, adapter=torch.bfloat16)
    told, reason = _C.explain_lora_linear_cuda(call(model[0], **plain), 80)
    assert told == "cuda cublas" and "predicted to be as fast" in reason, (told, reason)
    told, reason = _C.explain_lora_linear_cuda(call(model[0], **plain, tokens=16), 80)
    assert told == "cuda fused sm_80, backward cuda cublas" and "one kernel" in reason, told
    told, reason = _C.explain_lora_linear_cuda(call(model[0], out_features=50257), 80)
    assert told == "cuda cublas" and "no multiple of 8" in reason, (told, reason)
    told, reason = _C.explain_lora_linear_grouped_cuda(call(model[0]), 80)
    assert told == "cuda hybrid sm_80" and "all adapters" in reason, (told, reason)
    told, reason = _C.explain_lora_linear_grouped_cuda(call(model[0], r=257), 80)
    assert told == "cuda cublas" and "ranks 1 to 256" in reason, (told, reason)

# What autotune measured, unless the environment says otherwise
_C.set_tuned_cuda_path(call(model[0], backward=True), "composed")
told = _C.explain_lora_linear_cuda(call(model[0]), 80)[0]
if on_80 and info["cuda_path"] == "auto":
    assert told == "cuda hybrid sm_80, backward cuda cublas", told
_C.set_tuned_cuda_path(call(model[0], backward=True), None)
assert gpu_paths(model, 80)[0] == SM80[info["cuda_path"]]
try:
    _C.set_tuned_cuda_path(call(model[0]), "auto")
except ValueError as error:
    assert "path: got 'auto', expected 'fused', 'hybrid', 'composed' or None" in str(error)
else:
    raise AssertionError("'auto' is no path that autotune measures")

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    told = [row.path for row in lora_ext.explain(model.to_empty(device="cuda"))]
    assert told == gpu_paths(model, 10 * major + minor), told

# The environment variable, in processes of their own since it is read once
if "LORA_EXT_CUDA_PATH" not in os.environ:
    for wish in info["cuda_paths"][1:]:
        environment = os.environ | {"LORA_EXT_CUDA_PATH": wish}
        subprocess.run([sys.executable, __file__], env=environment, check=True)
    environment = os.environ | {"LORA_EXT_CUDA_PATH": "fast"}
    refused = subprocess.run([sys.executable, __file__], env=environment, stderr=subprocess.PIPE)
    assert (
        b"LORA_EXT_CUDA_PATH: got 'fast', expected 'auto', 'fused', 'hybrid'" in refused.stderr
    ), refused

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
print(
    f"lora_ext {info['version']}: CUDA {info['cuda']} build imported, path {info['cuda_path']}, "
    f"CPU path right; {gpu}"
)
