"""The devices that tests run on: the CPU, and a GPU where this build has kernels for it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_ext

_FACTS = Path("/proc/cpuinfo")
_CPU = frozenset(_FACTS.read_text().split() if _FACTS.exists() else ())


def multiplies_fp16() -> bool:
    """Whether this CPU has instructions for it, which ATen's BLAS then uses."""
    return "avx512_fp16" in _CPU and _may_use_all()


@functools.cache
def blas_has_one_order() -> bool:
    """Whether BLAS gives the same bits for the same matrices wherever they lie in memory. MKL's on
    an AMD EPYC with AVX2 does not, and then no two ways to call it have the same bits."""

    def placed(t: Tensor, at: int) -> Tensor:
        return torch.empty(t.numel() + 8, dtype=t.dtype)[at:][: t.numel()].view(t.shape).copy_(t)

    a, b = torch.randn(37, 33), torch.randn(65, 33)
    return all(
        torch.equal(placed(one, i) @ placed(other, j).t(), one @ other.t())
        for dtype in (torch.float32, torch.float64)
        for one, other in [(a.to(dtype), b.to(dtype)), (a[:7].to(dtype), b[:17].to(dtype))]
        for i in range(8)
        for j in range(8)
    )


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether they are equal; where BLAS itself has no one order, close: sums of some hundred terms
    in two orders differ by some ten roundings, and results of other operands by far more."""
    if blas_has_one_order() or not found.is_floating_point():
        return torch.equal(found, wanted)
    tolerance = 64 * torch.finfo(found.dtype).eps
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)


def dots_slowly() -> bool:
    """Whether this CPU's instructions for bf16 are slower than those for float32: Intel's
    AVX512_BF16, where there is no AMX."""
    return "GenuineIntel" in _CPU and "amx_bf16" not in _CPU and _may_use_all()


def _may_use_all() -> bool:
    return lora_ext.build_info()["cpu_capability"] in ("avx512_bf16", "amx_bf16")


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
