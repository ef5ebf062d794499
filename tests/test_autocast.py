"""torch.autocast: the base in 16 bits, the adapters as they are."""

from __future__ import annotations

import pytest
import torch
from devices import each_device
from problems import gradients, make_problem, rms


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_autocast(device: str, autocast_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    # Twice on a GPU, where both may round as often but sum in different orders
    factor = 1 if device == "cpu" else 2
    if adapter_dtype == torch.bfloat16:
        adapter_dtype = autocast_dtype
    p = make_problem((37,), dtype=torch.float32, dropout_p=0.1, device=device)
    p.lora_A = p.lora_A.detach().to(adapter_dtype).requires_grad_()
    p.lora_B = p.lora_B.detach().to(adapter_dtype).requires_grad_()
    exact = p.exact_operands()
    exact_y = p.plain(*exact)
    with torch.autocast(device, dtype=autocast_dtype):
        fused_y, plain_y = p.fused(), p.plain()
    assert fused_y.dtype == autocast_dtype
    assert rms(fused_y - exact_y) <= factor * rms(plain_y - exact_y)
    operands = list(p.operands)
    fused = gradients(fused_y, operands, p.dy.to(autocast_dtype))
    plain = gradients(plain_y, operands, p.dy.to(autocast_dtype))
    wanted = gradients(exact_y, exact, p.dy.to(autocast_dtype).double())
    for operand, got, other, want in zip(
        [t for t in operands if t is not None], fused, plain, wanted, strict=True
    ):
        assert got.dtype == operand.dtype
        # Plain PyTorch also rounds the same operands to 16 bits; ours may not be further off.
        assert rms(got - want) <= factor * rms(other - want)


@each_device
def test_autocast_off_inside_leaves_float32(device: str) -> None:
    p = make_problem((5,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert p.fused().dtype == torch.float32
