"""Every kind of layer on every device: the CPU's values and gradients in float64, and merging."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from devices import each_device
from torch import Tensor, nn

from lora_ext.nn import (
    AnyLayer,
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MergedLinear,
    MultiheadAttention,
)

Build = Callable[..., LoraLayer]
OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


def linear(**options: Any) -> Build:
    return lambda **place: Linear(18, 24, **OPTIONS, **options, **place)


def conv(kind: type[LoraLayer], **options: Any) -> Build:
    options = {"kernel_size": 3, "padding": 1, **options}
    return lambda **place: kind(4, 6, **OPTIONS, **options, **place)


def embedding(**options: Any) -> Build:
    return lambda **place: Embedding(31, 24, **OPTIONS, **options, **place)


def merged(**place: Any) -> LoraLayer:
    return MergedLinear(18, 24, enable_lora=[True, False, True], **OPTIONS, **place)


def attention(**place: Any) -> LoraLayer:
    return MultiheadAttention(24, 3, ("q", "v"), batch_first=True, **OPTIONS, **place)


def gru(**place: Any) -> LoraLayer:
    return AnyLayer.from_module(nn.GRU(18, 8, **place), ["weight_ih_l0"], **OPTIONS)


# A layer and the shapes of its inputs, one input three times for attention
LAYERS: dict[str, tuple[Build, list[tuple[int, ...]]]] = {
    "Linear": (linear(), [(5, 18)]),
    "Linear, transposed": (linear(fan_in_fan_out=True), [(5, 18)]),
    "Linear, DoRA": (linear(use_dora=True), [(5, 18)]),
    "Embedding": (embedding(), [(5, 7)]),
    "Embedding, padding": (embedding(padding_idx=3, scale_grad_by_freq=True), [(5, 7)]),
    "Conv1d": (conv(Conv1d), [(2, 4, 9)]),
    "Conv2d": (conv(Conv2d), [(2, 4, 9, 8)]),
    "Conv2d, groups": (conv(Conv2d, groups=2, stride=2), [(2, 4, 9, 8)]),
    "Conv2d, DoRA": (conv(Conv2d, use_dora=True), [(2, 4, 9, 8)]),
    "Conv3d": (conv(Conv3d), [(2, 4, 5, 6, 5)]),
    "MergedLinear": (merged, [(5, 18)]),
    "MultiheadAttention": (attention, [(2, 5, 24)] * 3),
    "AnyLayer": (gru, [(6, 2, 18)]),
}
each_layer = pytest.mark.parametrize(
    ("build", "shapes"), LAYERS.values(), ids=[name.replace(", ", "-") for name in LAYERS]
)


def inputs(layer: LoraLayer, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, Embedding):
        return [torch.randint(0, 31, shape, generator=generator) for shape in shapes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def outcome(layer: nn.Module, given: list[Tensor]) -> dict[str, Tensor]:
    """The result, and the gradients of inputs and parameters, on the CPU."""
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
    result = layer(*given)
    y = result[0] if isinstance(result, tuple) else result
    layer.zero_grad()
    y.square().sum().backward()
    found = {"y": y} | {f"input {i}": t.grad for i, t in enumerate(given) if t.requires_grad}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.detach().cpu() for name, t in found.items() if t is not None}


@each_layer
@each_device
def test_values_and_gradients_are_the_cpus(
    device: str, build: Build, shapes: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    on_cpu = build(dtype=torch.float64)
    here = copy.deepcopy(on_cpu).to(device)
    given = inputs(on_cpu, shapes)
    wanted, found = outcome(on_cpu, given), outcome(here, [t.to(device) for t in given])
    assert found.keys() == wanted.keys() and any("lora_A" in name for name in found)
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layer
@each_device
def test_it_merges_and_comes_back(
    device: str, build: Build, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = build(dtype=dtype, device=device)
    given = [t.to(device) for t in inputs(layer, shapes)]
    given = [t.to(dtype) if t.is_floating_point() else t for t in given]
    before = outcome(layer, given)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.merge()
    assert any(not torch.equal(p, weights[name]) for name, p in layer.named_parameters())
    y = layer(*given)
    assert (y[0] if isinstance(y, tuple) else y).isfinite().all()
    layer.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in layer.named_parameters())
    assert torch.equal(outcome(layer, given)["y"], before["y"])
