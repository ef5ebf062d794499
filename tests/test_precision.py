"""16-bit results lie closer to float64 than those of plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from devices import each_device
from problems import NAMES, gradients, make_problem, rms

SIZES = [(16, 768, 768, 8), (37, 257, 136, 17), (200, 512, 512, 64), (64, 1024, 4096, 16)]


@pytest.mark.parametrize("lora_share", [0.1, 1.0], ids=["small-update", "large-update"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@each_device
def test_error_against_plain_pytorch(
    device: str,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    dropout_p: float,
    lora_share: float,
) -> None:
    M, K, N, r = size
    p = make_problem((M,), K, N, r, dtype=dtype, bias=False, dropout_p=dropout_p, device=device)
    p.lora_B = (p.lora_B.detach() * lora_share).requires_grad_()
    exact = p.exact_operands()
    exact_y = p.plain(*exact)
    fused_y, plain_y = p.fused(), p.plain()
    error, plain_error = rms(fused_y.double() - exact_y), rms(plain_y.double() - exact_y)
    # On a GPU the two may sum in different orders: where both round as often, luck decides, and
    # twice as much is not luck.
    cpu = device == "cpu"
    assert error <= (0.9 if cpu else 1.0) * plain_error
    assert (fused_y - exact_y).abs().max() <= (1.25 if cpu else 2) * (plain_y - exact_y).abs().max()

    operands = list(p.operands)
    for name, got, plain, want in zip(
        [name for name, t in zip(NAMES, operands, strict=True) if t is not None],
        gradients(fused_y, operands, p.dy),
        gradients(plain_y, operands, p.dy),
        gradients(exact_y, exact, p.dy.double()),
        strict=True,
    ):
        assert rms(got.double() - want) <= (1 if cpu else 2) * rms(plain.double() - want), name
        assert (got - want).abs().max() <= 2 * (plain - want).abs().max(), name
