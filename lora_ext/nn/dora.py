"""DoRA, weight-decomposed LoRA (Liu et al., 2024, arXiv:2402.09353): a trained magnitude m for each
output feature beside the low-rank update of the direction.

With W' = W + scaling * B A and g = m / ||W'|| for each row (the norm is a constant for autograd):

    y = g * (x W'^T) + bias                                      without dropout
    y = x W^T + (g - 1) * (d W^T) + g * scaling * d A^T B^T + bias      with d = dropout(x)

as PEFT defines it. Dropout reaches W: that is a second base product, forward and backward. Several
active adapters follow each other in their order, as in PEFT: a DoRA adapter scales what the base
and the adapters before it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ext.functional import column_scale, draw_rng_state, dropout, lora_linear, lora_update
from lora_ext.nn.lora_layer import LoraLayer, LowRank

if TYPE_CHECKING:
    from lora_ext.nn.linear import Linear


def magnitude_scale(layer: LoraLayer, name: str) -> Tensor:
    """g, in the shape of the magnitude. A row of zeros has no direction: its norm counts as the
    smallest normal number, so that its magnitude, 0 at first, keeps it zero."""
    norm = layer._weight_norm(name)
    magnitude: Tensor = layer._part("lora_magnitude_vector", name)
    return magnitude.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def linear_forward(layer: Linear, x: Tensor, weight: Tensor) -> Tensor:
    """What a Linear makes of x [..., K] where a DoRA adapter runs; weight is [N, K]."""
    names = layer._running
    dropout_p = {n: layer.adapters[n].lora_dropout if layer.training else 0.0 for n in names}
    scaled = [n for n in names if layer.adapters[n].use_dora and dropout_p[n] == 0.0]
    # The bias is not scaled: it comes after the last scale.
    first_bias = None if scaled else layer.bias
    y: Tensor | None = None
    for name in names:
        A, B, lora_bias, scaling, p = layer._stack([name], dropout_p[name])
        if not layer.adapters[name].use_dora:
            y = (
                lora_linear(x, weight, first_bias, A, B, lora_bias, scaling=scaling, dropout_p=p)
                if y is None
                else y + lora_update(x, A, B, lora_bias, scaling, p)
            )
            continue
        g = magnitude_scale(layer, name)
        if p > 0.0:
            rng_state = draw_rng_state(x)
            dropped = dropout(x, rng_state, p)
            A, B = A.to(g.dtype), B.to(g.dtype) * g.unsqueeze(1)
            if y is None:
                y = lora_linear(
                    x, weight, first_bias, A, B, scaling=scaling, dropout_p=p, rng_state=rng_state
                )
            else:
                y = y + lora_update(dropped, A, B, None, scaling)
            y = y + column_scale(torch.nn.functional.linear(dropped, weight), g - 1)
            continue
        if y is None:
            y = lora_linear(x, weight, None, A, B, scaling=scaling)
        else:
            y = y + lora_update(x, A, B, None, scaling)
        y = column_scale(y, g, layer.bias if name == scaled[-1] else None)
    assert y is not None
    return y


def merged_stack(layer: LoraLayer, names: Sequence[str]) -> tuple[LowRank, Tensor | None]:
    """Adapters as one that is merged with a single rounding, and what multiplies the base's weight
    by rows, if anything: merged one after another, each DoRA adapter scales what is there."""
    if not any(layer.adapters[name].use_dora for name in names):
        return layer._stack(names), None
    scale: Tensor | None = None
    A_parts, B_parts, biases = [], [], []
    for name in reversed(names):
        A, B, lora_bias, scaling, _ = layer._stack([name])
        if layer.adapters[name].use_dora:
            g = magnitude_scale(layer, name).flatten()
            scale = g if scale is None else scale * g
        compute = torch.promote_types(B.dtype, torch.float32)
        factor = torch.full((B.shape[0],), scaling, dtype=compute, device=B.device)
        factor = factor if scale is None else factor * scale
        B = B.to(compute) * factor.view(-1, *[1] * (B.dim() - 1))
        A_parts.append(A.to(compute))
        B_parts.append(B)
        if lora_bias is not None:
            biases.append(lora_bias.to(compute) * factor)
    return (
        LowRank(
            torch.cat(A_parts, layer.RANK_DIMS[0]),
            torch.cat(B_parts, layer.RANK_DIMS[1]),
            torch.stack(biases).sum(0) if biases else None,
            1.0,
            0.0,
        ),
        scale,
    )
