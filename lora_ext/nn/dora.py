"""DoRA, weight-decomposed LoRA (Liu et al., 2024, arXiv:2402.09353): a trained magnitude m for each
output feature beside the low-rank update of the direction.

With W' = W + scaling * B A and g = m / ||W'|| for each row (the norm is a constant for autograd):

    y = g * (x W'^T) + bias                                      without dropout
    y = x W^T + (g - 1) * (d W^T) + g * scaling * d A^T B^T + bias      with d = dropout(x)

as PEFT defines it. Dropout reaches W. On the CPU `dora_linear` makes d W^T of x W^T and of a
product with the dropped elements alone, a fraction p of another base product, and so backward;
where that does not pay, and on other devices, it is a second base product. Several active adapters
follow each other in their order, as in PEFT: a DoRA adapter scales what the base and the adapters
before it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ext.functional import (
    column_scale,
    dora_linear,
    draw_rng_state,
    dropout,
    lora_linear,
    lora_update,
)
from lora_ext.nn.adapter import LowRank
from lora_ext.nn.lora_layer import LoraLayer

if TYPE_CHECKING:
    from lora_ext.nn.conv import _LoraConv
    from lora_ext.nn.linear import Linear


def magnitude_scale(layer: LoraLayer, name: str) -> Tensor:
    """g, in the shape of the magnitude. A row of zeros has no direction: its norm counts as the
    smallest normal number, so that its magnitude, 0 at first, keeps it zero."""
    norm = layer._weight_norm(name)
    magnitude: Tensor = layer._part("lora_magnitude_vector", name)
    return magnitude.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def scale_columns(layer: LoraLayer, name: str, y: Tensor) -> Tensor:
    """g * y, y [..., features]; y itself if this is no DoRA adapter."""
    if not layer.adapters[name].use_dora:
        return y
    return column_scale(y, magnitude_scale(layer, name))


def linear_forward(layer: Linear, x: Tensor, weight: Tensor) -> Tensor:
    """What a Linear makes of x [..., K] where a DoRA adapter runs; weight is [N, K]."""
    names = layer._running
    dropout_p = _dropout_p(layer)
    scaled = [n for n in names if layer.adapters[n].use_dora and dropout_p[n] == 0.0]
    first_bias = None if scaled else layer.bias  # the bias comes after the last scale

    def add(y: Tensor | None, low_rank: LowRank, rng_state: Tensor | None = None) -> Tensor:
        """y plus an adapter's product, or the first with the base's."""
        A, B, lora_bias, scaling, p = low_rank
        if y is not None:
            return y + lora_update(x, A, B, lora_bias, scaling, p, rng_state)
        return lora_linear(
            x, weight, first_bias, A, B, lora_bias, scaling=scaling, dropout_p=p,
            rng_state=rng_state,
        )  # fmt: skip

    y: Tensor | None = None
    for name in names:
        low_rank = layer._stack([name], dropout_p[name])
        if not layer.adapters[name].use_dora:
            y = add(y, low_rank)
            continue
        g = magnitude_scale(layer, name)
        if dropout_p[name] == 0.0:
            y = column_scale(add(y, low_rank), g, layer.bias if name == scaled[-1] else None)
            continue
        rng_state = draw_rng_state(x)
        low_rank = layer._stack([name], dropout_p[name], factors={name: g})
        if y is None:
            y = dora_linear(
                x, weight, first_bias, low_rank.lora_A, low_rank.lora_B, g,
                scaling=low_rank.scaling, dropout_p=dropout_p[name], rng_state=rng_state,
            )  # fmt: skip
            continue
        dropped = dropout(x, rng_state, dropout_p[name])
        y = add(y, low_rank, rng_state)
        y = y + column_scale(torch.nn.functional.linear(dropped, weight), g - 1)
    assert y is not None
    return y


def conv_forward(layer: _LoraConv, x: Tensor) -> Tensor:
    """What a convolution makes of x where a DoRA adapter runs."""
    y = layer._convolve(x, layer.weight, None)
    dtype, channels = y.dtype, (-1, *[1] * len(layer.kernel_size))
    for name, p in _dropout_p(layer).items():
        low_rank = layer._stack([name], p)
        if not layer.adapters[name].use_dora:
            y = y + layer._update(x, low_rank)
            if low_rank.lora_bias is not None:
                y = y + (low_rank.lora_bias * low_rank.scaling).view(channels)
            continue
        g = magnitude_scale(layer, name).view(channels)
        if p == 0.0:
            y = g * (y + layer._update(x, low_rank))
            continue
        dropped = torch.nn.functional.dropout(x, p)
        update = layer._update(dropped, low_rank._replace(dropout_p=0.0))
        y = y + (g - 1) * layer._convolve(dropped, layer.weight, None) + g * update
    if layer.bias is not None:
        y = y + layer.bias.view(channels)
    return y.to(dtype)


def _dropout_p(layer: LoraLayer) -> dict[str, float]:
    """Of the adapters that run, in their order."""
    return {n: layer.adapters[n].lora_dropout if layer.training else 0.0 for n in layer._running}


def merge_factors(
    layer: LoraLayer, names: Sequence[str]
) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """What multiplies the output features of each adapter, and of the base's weight, when they are
    merged one after another: each DoRA adapter scales what is there. None without one."""
    if not any(layer.adapters[name].use_dora for name in names):
        return None, None
    factors: dict[str, Tensor] = {}
    factor: Tensor | None = None
    for name in reversed(names):
        if layer.adapters[name].use_dora:
            g = magnitude_scale(layer, name).flatten()
            factor = g if factor is None else factor * g
        if factor is None:
            rows = layer._part("lora_B", name)
            factors[name] = torch.ones(rows.shape[0], device=rows.device)
        else:
            factors[name] = factor
    return factors, factor
