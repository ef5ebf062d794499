"""The devices that tests run on: the CPU, and a GPU where this build has kernels for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lora_ext

_FACTS = Path("/proc/cpuinfo")
_CPU = frozenset(_FACTS.read_text().split() if _FACTS.exists() else ())


def multiplies_fp16() -> bool:
    """Whether this CPU has instructions for it, which ATen's BLAS then uses."""
    return "avx512_fp16" in _CPU and _may_use_all()


def dots_slowly() -> bool:
    """Whether this CPU's instructions for bf16 are slower than those for float32: Intel's
    AVX512_BF16, where there is no AMX."""
    return "GenuineIntel" in _CPU and "amx_bf16" not in _CPU and _may_use_all()


def _may_use_all() -> bool:
    return lora_ext.build_info()["cpu_capability"] == "avx512_bf16"


def _why_no_cuda() -> str | None:
    if lora_ext.build_info()["cuda"] is None:
        return "this build of lora_ext is for CPUs; make gpu-test builds for a GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


NO_CUDA = _why_no_cuda()
DEVICES = [pytest.param("cpu")]
if NO_CUDA is None:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))

# For a test that is the same everywhere. One for a GPU alone is in test_cuda.py.
each_device = pytest.mark.parametrize("device", DEVICES)


def cuda_path(out_features: int, in_features: int, r: int, dtype: torch.dtype) -> str:
    """What lora_linear runs on this GPU, as `explain` tells it."""
    from lora_ext._extension import _C

    major, minor = torch.cuda.get_device_capability()
    call = _C.CudaCall(
        backward=False, device=torch.cuda.current_device(), tokens=2048, out_features=out_features,
        in_features=in_features, r=r, base=dtype, adapter=dtype, dropout=False,
    )  # fmt: skip
    return _C.explain_lora_linear_cuda(call, 10 * major + minor)[0]
