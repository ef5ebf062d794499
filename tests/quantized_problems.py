"""Layers over quantized bases beside the same over the dequantised values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext.nn as lora
from lora_ext import quant
from lora_ext.quant.call import values
from lora_ext.quant.modules import quantized_weight

N, K, ROWS = 24, 90, 7

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.2},
}


def plain_linear(seed: int = 0, shape: tuple[int, int] = (N, K)) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(shape[1], shape[0])


def matrix_of(base: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of its weight."""
    return values(quantized_weight(base), dtype)


def randomise(layer: Any, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name in layer.adapters:
        for parameter in layer.adapter_parameters(name).values():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data += noise.to(parameter)
    return layer


def dequantised(layer: Any, dtype: torch.dtype = torch.float32) -> lora.Linear:
    """The layer over the plain base of the same values, with the same adapters."""
    matrix = matrix_of(layer.base_layer, dtype)
    base = nn.Linear(matrix.shape[1], matrix.shape[0])
    base.weight = nn.Parameter(matrix, requires_grad=False)
    base.bias = nn.Parameter(layer.base_layer.bias.detach().to(dtype))
    twin = lora.Linear.from_linear(base, r=0).train(layer.training)
    for name, settings in layer.adapters.items():
        twin.add_adapter(name, **vars(settings))
        for key, parameter in twin.adapter_parameters(name).items():
            parameter.data.copy_(layer.adapter_parameters(name)[key])
    if layer.adapters:
        twin.set_adapter(layer.active_adapters)
    return twin


def inputs(dtype: torch.dtype = torch.float32, width: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, ROWS, width, generator=generator).to(dtype).requires_grad_()


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the adapters."""
    torch.manual_seed(11)
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    own = getattr(layer, "adapters", ())
    parts = [p for name in own for p in layer.adapter_parameters(name).values()]
    return [y, *torch.autograd.grad(y, [x, *parts], dy)]


def assert_as_exact(mine: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Off by no more than twice what the layer over the dequantised base is, whose sums are the
    same in another order, and one rounding."""
    assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
    error, bound = ((y.double() - exact).abs().max().item() for y in (mine, theirs))
    assert error <= 2 * bound + torch.finfo(mine.dtype).eps * exact.abs().max().item()


class Foreign(nn.Module):
    """A layer of a library that is not known: halves in int8."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.codes = nn.Parameter((weight * 64).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(bias)
        self.calls = 0

    def dequantize(self) -> Tensor:
        self.calls += 1
        return self.codes.float() / 64

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias.to(x.dtype))


quant.register_dequantizer(Foreign, Foreign.dequantize)

BASES: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: quant.Linear.from_linear(plain_linear(), "nf4"),
    "nf4 nested": lambda: quant.Linear.from_linear(
        plain_linear(), "nf4", block_size=32, nested=True
    ),
    "fp4": lambda: quant.Linear.from_linear(plain_linear(), "fp4", block_size=128),
    "int8": lambda: quant.Linear.from_linear(plain_linear(), "int8"),
    "foreign": lambda: Foreign(plain_linear().weight.detach(), plain_linear().bias.detach()),
}
each_base = pytest.mark.parametrize("base", BASES)
