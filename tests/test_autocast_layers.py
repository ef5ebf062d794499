"""torch.autocast of every kind of layer: the dtype that PEFT's layer gives, and no larger error."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import rms
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraModel


class Attention(nn.MultiheadAttention):
    """Of one input, so that the model has one."""


class Net(nn.Module):
    def __init__(self, layer: nn.Module, arguments: int) -> None:
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, x: Tensor) -> Any:
        return self.layer(*[x] * self.arguments)


KINDS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "Linear": (lambda: nn.Linear(64, 48), (37, 64), {}),
    "Linear, lora_bias": (lambda: nn.Linear(64, 48), (37, 64), {"lora_bias": True}),
    "Linear, DoRA": (lambda: nn.Linear(64, 48), (37, 64), {"use_dora": True}),
    "Embedding": (lambda: nn.Embedding(64, 48), (37,), {}),
    "Embedding, DoRA": (lambda: nn.Embedding(64, 48), (37,), {"use_dora": True}),
    "Conv1d": (lambda: nn.Conv1d(16, 24, 3), (2, 16, 9), {}),
    "Conv2d": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 7), {}),
    "Conv2d, DoRA": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 7), {"use_dora": True}),
    "Conv3d": (lambda: nn.Conv3d(8, 12, 3), (2, 8, 4, 4, 4), {}),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(64, 4), (9, 2, 64), {}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMBINATIONS = [
    (autocast, x, weight)
    for autocast, x, weight in itertools.product(DTYPES[1:], DTYPES, DTYPES[:2])
]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def made(kind: str, dtype: torch.dtype, folder: Path, **more: Any) -> tuple[Any, Any, Any, Tensor]:
    """Ours, PEFT's, and PEFT's in float64 with the same values; and x in float64."""
    make, shape, options = KINDS[kind]
    torch.manual_seed(0)
    arguments = 3 if kind.startswith("Multi") else 1
    base = Net(make(), arguments).to(dtype)
    config = peft.LoraConfig(
        target_modules=["layer"], r=8, lora_alpha=16, init_lora_weights=False, **options, **more
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(folder)
    ours = LoraModel.from_pretrained(base, folder)
    exact = copy.deepcopy(theirs).double()
    x = torch.randint(0, 64, shape) if kind.startswith("Emb") else torch.randn(shape).double()
    return ours, theirs, exact, x


def result(y: Any) -> Tensor:
    tensor: Tensor = y[0] if isinstance(y, tuple) else y
    return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_values_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    models = {}
    for weight in DTYPES[:2]:
        models[weight] = made(kind, weight, tmp_path / name(weight))
    for autocast, x_dtype, weight in COMBINATIONS:
        ours, theirs, exact, x = models[weight]
        if x.is_floating_point():
            x = x.to(x_dtype)
        with torch.no_grad():
            expected = result(exact.eval()(x.double() if x.is_floating_point() else x))
            with torch.autocast("cpu", dtype=autocast):
                got, twin = result(ours.eval()(x)), result(theirs.eval()(x))
        combination = f"autocast {name(autocast)}, x {name(x_dtype)}, weight {name(weight)}"
        assert got.dtype == twin.dtype, f"{combination}: {got.dtype}, PEFT's {twin.dtype}"
        print(kind, combination, rms(got - expected) / rms(twin - expected))
        assert rms(got - expected) <= rms(twin - expected), combination
