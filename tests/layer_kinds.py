"""A base of each kind, what adapts it, and an input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.parallel
from torch import Tensor, nn

import lora_ext.nn as lora


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


OPTIONS: dict[str, Any] = {"r": 2, "init_lora_weights": False}
X, TOKENS, SEQUENCE = torch.randn(3, 8), torch.tensor([1, 2]), torch.randn(3, 2, 8)
Kind = tuple[Callable[[], nn.Module], Callable[[Any], Any], tuple[Tensor, ...]]
KINDS: dict[str, Kind] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda b: lora.Linear.from_linear(b, **OPTIONS), (X,)),
    "DoRA": (
        lambda: nn.Linear(8, 6),
        lambda b: lora.Linear.from_linear(b, use_dora=True, **OPTIONS),
        (X,),
    ),
    "MergedLinear": (
        lambda: nn.Linear(8, 6),
        lambda b: lora.MergedLinear.from_linear(b, enable_lora=[True, False], **OPTIONS),
        (X,),
    ),
    "Embedding": (
        lambda: nn.Embedding(9, 6),
        lambda b: lora.Embedding.from_embedding(b, **OPTIONS),
        (TOKENS,),
    ),
    "Conv2d": (
        lambda: nn.Conv2d(3, 6, 3),
        lambda b: lora.Conv2d.from_conv(b, **OPTIONS),
        (torch.randn(1, 3, 8, 8),),
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2),
        lambda b: lora.MultiheadAttention.from_multihead_attention(b, **OPTIONS),
        (SEQUENCE, SEQUENCE, SEQUENCE),
    ),
    "AnyLayer": (
        lambda: nn.GRU(8, 8),
        lambda b: lora.AnyLayer.from_module(b, ["weight_ih_l0"], **OPTIONS),
        (X,),
    ),
    "ParamLayer": (
        Stack,
        lambda b: lora.ParamLayer.from_module(b, ["w"], **OPTIONS),
        (torch.randn(2, 5),),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def first(y: Any) -> Tensor:
    result: Tensor = y[0] if isinstance(y, tuple) else y
    return result


def expected(base: nn.Module, adapt: Callable[[Any], Any], args: Any) -> tuple[Any, Tensor]:
    """The layer over a plain copy of base, and its result."""
    torch.manual_seed(1)
    layer = adapt(copy.deepcopy(base))
    return layer, first(layer(*args))
