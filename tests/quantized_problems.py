"""Layers over quantized bases beside the same over the dequantised values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lora_ext.nn as lora
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
