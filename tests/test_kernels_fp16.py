"""A base of fp16 on the emulated CUDA kernels: magnitudes that fp16 has no exponents for, against
float64, with the error of plain PyTorch as the yardstick."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from emulated import GPUS, EmulatedKernels
from emulated_multi import backward_together, exact, forward_together, make_layers
from problems import rms
from torch import Tensor

FP16, FP32 = torch.float16, torch.float32
# RMS of roundings of the operands and of the result, in float16; of two float16 and float32's sums
ROUNDED, FLOAT = 2.0**-10, 2.0**-20


class Sizes(NamedTuple):
    """Of the values; the adapters are fp16 or float32."""

    x: float
    dy: float
    A: float
    B: float
    scaling: float = 1.0


CASES = {
    "as usual": Sizes(1, 1, 1 / 16, 1e-2),
    "early, small gradients": Sizes(1, 1e-4, 1 / 16, 1e-5),
    "tiny": Sizes(1e-2, 1e-4, 1e-4, 1e-6, 0.125),
    "large h": Sizes(64, 1e-2, 16, 1e-5, 16),  # 2^14 and more, 16 times
    "large dh": Sizes(1e-2, 64, 1e-5, 64, 16),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.shared(tmp_path_factory)


def operands(M: int, r: int, size: Sizes, adapter: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(M + r)
    K, N = 136, 200
    return {
        "x": (torch.randn(M, K, generator=g) * size.x).to(FP16),
        "dy": (torch.randn(M, N, generator=g) * size.dy).to(FP16),
        "weight": torch.zeros(N, K, dtype=FP16),  # the low-rank part shows
        "A": (torch.randn(r, K, generator=g) * size.A).to(adapter),
        "B": (torch.randn(N, r, generator=g) * size.B).to(adapter),
    }


def plain(t: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    x, A, B = (t[name].clone().requires_grad_() for name in ("x", "A", "B"))
    y = (x.to(A.dtype) @ A.t() @ B.t() * scaling).to(x.dtype)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), t["dy"])
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def error(got: Tensor, want: Tensor) -> float:
    """Relative; what is beyond fp16 in the result itself is infinite, everywhere."""
    inside = want.abs() < 6e4 if got.dtype == FP16 else torch.ones_like(want, dtype=torch.bool)
    return rms((got.double() - want)[inside]) / rms(want[inside]) if inside.any() else 0.0


def granularity(name: str, want: Tensor, dtype: torch.dtype) -> float:
    """Half a step of fp16's denormals, over the result."""
    return 2.0**-25 / rms(want) if dtype == FP16 else 0.0


@pytest.mark.parametrize("M", [16, 130], ids=["few rows", "passes"])
@pytest.mark.parametrize("adapter", [FP16, FP32], ids=str)
@pytest.mark.parametrize("family", GPUS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("r", [8, 40])
def test_magnitudes(
    kernels: EmulatedKernels, case: str, family: str, adapter: torch.dtype, M: int, r: int
) -> None:
    size = CASES[case]
    t = operands(M, r, size, adapter)
    want = plain({name: value.double() for name, value in t.items()}, size.scaling)
    told = plain(t, size.scaling)
    kernels.gpu(GPUS[family], 3)
    kernels.schedule("random", 1)
    pair = t["A"], t["B"]
    y, h = kernels.forward(t["x"], t["weight"], None, *pair, scaling=size.scaling)
    for which, kept in (("kept", h), ("made", None)):
        rest = kernels.backward(t["dy"], t["x"], kept, t["weight"], *pair, scaling=size.scaling)
        for name, got in zip(("y", "dx", "dA", "dB"), (y, *rest), strict=True):
            limit = ROUNDED if got.dtype == FP16 else FLOAT
            # Few rows make h of lora_A as fp16, and of what that leaves as bf16, which also reads x
            # so: 2^-9 of half a step of fp16, one of its denormals at the least.
            if name in ("y", "dB") and M <= 64 and kept is not None and adapter == FP32:
                limit += 2.0**-9 * max(2.0**-25 / size.A, 2.0**-12)
            limit += granularity(name, want[name], got.dtype)
            found = error(got, want[name])
            of_plain = error(told[name], want[name])
            assert found <= limit, f"{name}, h {which}: {found}, of plain PyTorch {of_plain}"


@pytest.mark.parametrize("adapter", [FP16, FP32], ids=str)
@pytest.mark.parametrize("family", GPUS)
def test_layers_of_one_x(kernels: EmulatedKernels, family: str, adapter: torch.dtype) -> None:
    """Whose dh lie beside each other: of different magnitudes and scalings."""
    kernels.gpu(GPUS[family], 3)
    kernels.schedule("random", 2)
    x, layers = make_layers(130, 136, [(200, 17), (72, 40)], dtype=FP16, adapter_dtype=adapter)
    for layer, size in zip(layers, (2.0**-14, 2.0**-10), strict=True):
        layer.dy.mul_(size)
        layer.lora_B.mul_(2.0**-6 if adapter == FP16 else 2.0**-14)
    dx_exact, wanted, dx_size = exact(x, layers)
    found = forward_together(kernels, x, layers)
    dx, gradients = backward_together(kernels, x, layers, [one["h"] for one in found], True)
    assert rms(dx.double() - dx_exact) <= ROUNDED * rms(dx_size)
    for one, made, want in zip(found, gradients, wanted, strict=True):
        for name, got in (one | made).items():
            limit = ROUNDED if got.dtype == FP16 else FLOAT
            limit += granularity(name, want[name], got.dtype)
            assert error(got, want[name]) <= limit, name


@pytest.mark.parametrize("family", GPUS)
def test_an_embedding(kernels: EmulatedKernels, family: str) -> None:
    kernels.gpu(GPUS[family], 3)
    g = torch.Generator().manual_seed(1)
    dy = (torch.randn(130, 136, generator=g) * 1e-3).to(FP16)
    B, h = torch.randn(136, 16, generator=g) * 1e-5, torch.randn(130, 16, generator=g) * 2.0**18
    dh, dB = kernels.up_grad(dy, h, B, 16.0)
    for got, want in ((dh, 16 * dy.double() @ B.double()), (dB, 16 * dy.double().t() @ h.double())):
        assert error(got, want) <= FLOAT


@pytest.mark.parametrize("M", [16, 130], ids=["few rows", "passes"])
@pytest.mark.parametrize("family", GPUS)
def test_an_adapter_that_is_zero_adds_zero(kernels: EmulatedKernels, family: str, M: int) -> None:
    """Of h beyond 65504, too."""
    t = operands(M, 8, Sizes(64, 1, 64, 0, 16), FP32)
    kernels.gpu(GPUS[family], 3)
    y, h = kernels.forward(t["x"], t["weight"], None, t["A"], t["B"], scaling=16.0)
    dx, dA, dB = kernels.backward(t["dy"], t["x"], h, t["weight"], t["A"], t["B"], scaling=16.0)
    assert not y.any() and not dx.any() and not dA.any()
    assert dB.isfinite().all() and dB.any()
