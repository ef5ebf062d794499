"""torch.autocast: the base in 16 bits, the adapters as they are."""

from __future__ import annotations

import pytest
import torch
from devices import each_device
from problems import gradients, make_problem, rms
from torch import Tensor

import lora_ext


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


@pytest.mark.parametrize("operator", ["lora_linear", "dora_linear"])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@each_device
def test_float32_adapters_stay_as_they_are(
    device: str, autocast_dtype: torch.dtype, operator: str
) -> None:
    """Autocast is casting the base's operands by hand, and nothing of the adapter: bit for bit."""
    p = make_problem((37,), dtype=torch.float32, dropout_p=0.1, lora_bias=True, device=device)
    *base, lora_A, lora_B, lora_bias = p.operands
    options = {"scaling": p.scaling, "dropout_p": p.dropout_p, "rng_state": p.rng_state}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if operator == "lora_linear":
            return lora_ext.lora_linear(x, weight, bias, lora_A, lora_B, lora_bias, **options)
        scale = torch.linspace(0.5, 1.5, len(weight), device=device)
        return lora_ext.functional.dora_linear(
            x, weight.detach(), bias, lora_A, lora_B, scale, **options
        )

    with torch.autocast(device, dtype=autocast_dtype):
        y = call(*base)
    by_hand = call(*(t.to(autocast_dtype) for t in base))
    assert y.dtype == autocast_dtype and torch.equal(y, by_hand)
    leaves = [p.x, p.bias, lora_A, lora_B]
    dy = p.dy.to(autocast_dtype)
    for got, want in zip(gradients(y, leaves, dy), gradients(by_hand, leaves, dy), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_that_are_added_do_not_widen_the_result(
    weight_dtype: torch.dtype, use_dora: bool
) -> None:
    """Those with another dropout probability than the first are added to the result, in PyTorch."""
    layer = lora_ext.nn.Linear(6, 4, r=2, lora_dropout=0.1, use_dora=use_dora, dtype=weight_dtype)
    layer.add_adapter("other", r=3, lora_dropout=0.0)
    layer.set_adapter(["default", "other"])
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(torch.randn(5, 6)).dtype == torch.float16
