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
from typing import TypeVar

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
from lora_ext.nn.adapter import AdapterSettings, LowRank, stacked
from lora_ext.nn.conv import LoraConv
from lora_ext.nn.embedding import Embedding
from lora_ext.nn.linear import Linear
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.variant import LoraVariant
from lora_ext.paths import dora_linear_path

MAGNITUDE = "lora_magnitude_vector"
Kind = TypeVar("Kind", bound=LoraLayer)


def magnitude_scale(layer: LoraLayer, name: str) -> Tensor:
    """g, in the shape of the magnitude."""
    return scale_of(layer._part(MAGNITUDE, name), layer._weight_norm(name))


def scale_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g. A row of zeros has no direction: its norm counts as the smallest normal number, so that
    its magnitude, 0 at first, keeps it zero."""
    return magnitude.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


class Dora(LoraVariant[Kind]):
    """What DoRA is for every kind of layer: one magnitude for each output feature."""

    FLAG = "use_dora"
    READS_WEIGHT = True

    def part_shapes(self, layer: Kind, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        return {MAGNITUDE: layer._weight_norm_shape()}

    @torch.no_grad()
    def initialise(self, layer: Kind, adapter_name: str) -> None:
        """Makes the magnitude the norm, so that it scales by 1."""
        layer._part(MAGNITUDE, adapter_name).copy_(layer._weight_norm(adapter_name))

    def merge_factors(
        self, layer: Kind, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Each DoRA adapter scales what is there."""
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

    def explain(self, layer: Kind, tokens: int) -> str:
        if not _with_dropout(layer):
            return "DoRA scales y, and dy, in one more pass"
        return "DoRA with dropout needs a second base product, forward and backward"


def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[LowRank, Tensor | None]],
) -> Tensor:
    """A linear layer's forward with adapters in their order, each with the g of its DoRA, or None.

    x [..., in_features], weight [out_features, in_features], g [out_features] →
    [..., out_features].
    """
    if _is_wide(adapters[0][0], x) and (len(adapters) > 1 or not x.is_cpu):
        return _in_adapters_dtype(x, weight, bias, adapters)
    scaled = [i for i, (one, g) in enumerate(adapters) if g is not None and one.dropout_p == 0.0]
    first_bias = None if scaled else bias  # the bias comes after the last scale

    def add(y: Tensor | None, low_rank: LowRank, rng_state: Tensor | None = None) -> Tensor:
        """y plus an adapter's product, or the first with the base's."""
        A, B, lora_bias, scaling, p = low_rank
        if y is not None:
            update = lora_update(x, A, B, lora_bias, scaling, p, rng_state, dtype=A.dtype)
            return (y + update).to(y.dtype)
        return lora_linear(
            x, weight, first_bias, A, B, lora_bias, scaling=scaling, dropout_p=p,
            rng_state=rng_state,
        )  # fmt: skip

    y: Tensor | None = None
    for i, (low_rank, g) in enumerate(adapters):
        dropout_p = low_rank.dropout_p
        if g is None:
            y = add(y, low_rank)
            continue
        wide = _is_wide(low_rank, x)
        if dropout_p == 0.0 and not wide:
            y = column_scale(add(y, low_rank), g, bias if i == scaled[-1] else None)
            continue
        rng_state = draw_rng_state(x) if dropout_p else x.new_zeros(2, dtype=torch.int64)
        low_rank = stacked([low_rank], [g])
        if wide:
            first_bias = bias
        if y is None:
            y = dora_linear(
                x, weight, first_bias, low_rank.lora_A, low_rank.lora_B, g,
                scaling=low_rank.scaling, dropout_p=dropout_p, rng_state=rng_state,
            )  # fmt: skip
            continue
        d = dropout(x, rng_state, dropout_p)
        y = add(y, low_rank, rng_state)
        y = y + column_scale(torch.nn.functional.linear(d, weight), g - 1)
    assert y is not None
    return y


def _is_wide(low_rank: LowRank, x: Tensor) -> bool:
    """Whether an adapter is of more bits than its base. Then g is part of lora_B: g * dy, rounded
    to the base's dtype, would spoil the gradients of both."""
    return low_rank.lora_A.dtype.itemsize > x.dtype.itemsize


def _in_adapters_dtype(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[LowRank, Tensor | None]],
) -> Tensor:
    """The same with everything but the base's products in the adapters' dtype, rounded once."""
    base = torch.nn.functional.linear(x, weight)
    y = base.to(adapters[0][0].lora_A.dtype)
    for low_rank, g in adapters:
        A, B, lora_bias, scaling, p = low_rank
        rng_state = draw_rng_state(x) if p > 0.0 else None
        update = lora_update(x, A, B, lora_bias, scaling, p, rng_state, dtype=A.dtype)
        if g is None:
            y = y + update
        elif rng_state is None:
            y = column_scale(y + update, g)
        else:
            d = dropout(x, rng_state, p)
            v = torch.nn.functional.linear(d, weight).to(y.dtype)
            y = y + column_scale(v, g - 1) + column_scale(update, g)
    return (y if bias is None else y + bias).to(base.dtype)


class LinearDora(Dora[Linear]):
    """DoRA on a linear layer."""

    def forward(self, layer: Linear, x: Tensor, names: Sequence[str]) -> Tensor:
        adapters, weight = [], layer._weight_matrix()
        for name, p in _dropout_p(layer, names).items():
            g = magnitude_scale(layer, name) if layer.adapters[name].use_dora else None
            adapters.append((layer._stack([name], p), g))
        return dora(x, weight, layer._bias_vector(), adapters)

    def explain(self, layer: Linear, tokens: int) -> str:
        drops, dense = _with_dropout(layer), super().explain(layer, tokens)
        if not drops:
            return dense
        dropout_p = layer.adapters[drops[0]].lora_dropout
        path, reason = dora_linear_path(layer._adapted_weight(), dropout_p, tokens)
        if path and drops != [layer._running[0]]:
            path, reason = "", "another adapter runs before it"
        return f"DoRA with dropout: {reason}" if path else f"{dense}: {reason}".rstrip(": ")


class ConvDora(Dora[LoraConv]):
    """DoRA on a convolution."""

    def forward(self, layer: LoraConv, x: Tensor, names: Sequence[str]) -> Tensor:
        y = layer._convolve(x, layer.weight, None)
        dtype, channels = y.dtype, (-1, *[1] * len(layer.kernel_size))
        for name, p in _dropout_p(layer, names).items():
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
            d = torch.nn.functional.dropout(x, p)
            update = layer._update(d, low_rank._replace(dropout_p=0.0))
            y = y + (g - 1) * layer._convolve(d, layer.weight, None) + g * update
        if layer.bias is not None:
            y = y + layer.bias.view(channels)
        return y.to(dtype)


class EmbeddingDora(Dora[Embedding]):
    """DoRA on an embedding, whose output features are the dimensions."""

    def part_shapes(
        self, layer: Embedding, settings: AdapterSettings
    ) -> dict[str, tuple[int, ...]]:
        if layer.max_norm is not None:
            raise ValueError(
                f"Embedding: use_dora: got True with max_norm {layer.max_norm}, expected False: a "
                "lookup rescales rows of the weight, so its norm would depend on those that were "
                "looked up before"
            )
        return super().part_shapes(layer, settings)

    def forward(self, layer: Embedding, x: Tensor, names: Sequence[str]) -> Tensor:
        first, *others = names
        wide = layer._part("lora_A", first).dtype.itemsize > layer.weight.dtype.itemsize
        if layer._is_fused() and not wide:
            y = self._scaled(layer, first, layer._fused_look_up(x, [first]))
            for name in others:
                y = self._scaled(layer, name, y + layer._update(x, name).to(y.dtype))
            return y
        y = layer._look_up(x, layer.weight, layer.sparse)
        for name in names:  # lookups of their own, since max_norm is each one's
            y = self._scaled(layer, name, y + layer._update(x, name))
        return y.to(layer.weight.dtype)

    def _scaled(self, layer: Embedding, name: str, y: Tensor) -> Tensor:
        """g * y, y [..., features]; y itself if this is no DoRA adapter."""
        if not layer.adapters[name].use_dora:
            return y
        return column_scale(y, magnitude_scale(layer, name))

    def explain(self, layer: Embedding, tokens: int) -> str:
        return "DoRA scales y, and dy, in one more pass"  # token numbers: nothing is dropped


def _dropout_p(layer: LoraLayer, names: Sequence[str]) -> dict[str, float]:
    """Of these adapters, in their order."""
    return {n: layer.adapters[n].lora_dropout if layer.training else 0.0 for n in names}


def _with_dropout(layer: LoraLayer) -> list[str]:
    """Those that run that are of DoRA, and have dropout now."""
    dropout_p = _dropout_p(layer, layer._running)
    return [n for n in layer._running if layer.adapters[n].use_dora and dropout_p[n] > 0.0]
