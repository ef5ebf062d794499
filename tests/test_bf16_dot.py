"""The kernels on bf16 dot products: rows they copy, what they keep of h and dh, infinities."""

from __future__ import annotations

import pytest
import torch
from problems import NAMES, gradients, make_problem, rms

import lora_ext

CAPABILITY = lora_ext.build_info()["cpu_capability"]
pytestmark = pytest.mark.skipif(
    CAPABILITY not in ("avx512_bf16", "amx_bf16"),
    reason=f"this CPU has no bf16 dot products, only {CAPABILITY}",
)


def errors(M: int, K: int, N: int, r: int, dropout_p: float, lora_share: float) -> dict[str, float]:
    """RMS error of each result, over that of plain PyTorch in bf16."""
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16, bias=False, dropout_p=dropout_p)
    p.lora_B = (p.lora_B.detach() * lora_share).requires_grad_()
    exact, operands = p.exact_operands(), list(p.operands)
    ys = p.fused(), p.plain(), p.plain(*exact)
    results = [
        [y, *gradients(y, leaves, p.dy.to(y.dtype))]
        for y, leaves in zip(ys, (operands, operands, exact), strict=True)
    ]
    names = ["y", *(n for n, t in zip(NAMES, operands, strict=True) if t is not None)]
    return {
        name: rms(got.double() - want) / rms(plain.double() - want)
        for name, got, plain, want in zip(names, *results, strict=True)
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("lora_share", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("size", [(100, 512, 512, 16), (300, 130, 1025, 7), (200, 512, 300, 64)])
def test_error(size: tuple[int, int, int, int], lora_share: float, dropout_p: float) -> None:
    """Roundings, counted in squares as in test_precision.py: y's low-rank part, of size L, and y
    itself; dx's dh, too. Plain PyTorch rounds h (or dh), the low-rank part, the base's and their
    sum. The gradients of A and B see a quarter of h and dh unrounded, then are rounded: 1.75 for
    its 2. Beyond four standard deviations, 4 / sqrt(M r), is not luck."""
    got = errors(*size, dropout_p, lora_share)
    luck, square = 1 + 4 / (size[0] * size[3]) ** 0.5, lora_share**2
    assert got["y"] <= ((1 + 2 * square) / (2 + 3 * square)) ** 0.5 * luck
    assert got["x"] <= ((1 + 3 * square) / (2 + 3 * square)) ** 0.5 * luck
    assert max(got["lora_A"], got["lora_B"]) <= (1.75 / 2) ** 0.5 * luck


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("K", [512, 640, 1024])
def test_rows_copied_or_not_are_the_same(K: int, dropout_p: float) -> None:
    """Rows that share a cache set are copied on the way; their distance must not show."""
    p = make_problem((50,), K, 40, 8, dtype=torch.bfloat16, dropout_p=dropout_p)
    y = p.fused()
    grads = gradients(y, list(p.operands), p.dy)
    padded = torch.full((50, K + 24), torch.nan, dtype=torch.bfloat16)
    padded[:, :K] = p.x.detach()
    p.x = padded[:, :K].requires_grad_()
    assert torch.equal(p.fused(), y)
    for got, want in zip(gradients(p.fused(), list(p.operands), p.dy), grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("width", [31, 32])
def test_infinities_stay_where_they_are(width: int) -> None:
    """The remainder of a rounded infinity is nothing, not NaN. In the gradients of A and B an
    infinite dy meets value and remainder, whose signs may differ: there it may become NaN."""
    p = make_problem((40,), width, 20, 4, dtype=torch.bfloat16, bias=False)
    with torch.no_grad():
        p.x[3, width - 1] = torch.inf
        p.dy[7, 2] = -torch.inf
    operands = list(p.operands)
    fused, plain = p.fused(), p.plain()
    assert torch.equal(fused.isnan(), plain.isnan())
    assert torch.equal(fused.isposinf(), plain.isposinf())
    for got, want in zip(
        gradients(fused, operands, p.dy), gradients(plain, operands, p.dy), strict=True
    ):
        assert torch.equal(got.isfinite(), want.isfinite())


def test_scaling_zero_is_exactly_the_base() -> None:
    p = make_problem((64,), dtype=torch.bfloat16)
    y = lora_ext.lora_linear(*p.operands, scaling=0.0)
    assert torch.equal(y, torch.nn.functional.linear(p.x, p.weight, p.bias))
