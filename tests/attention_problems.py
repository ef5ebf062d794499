"""Layers of attention, inputs and calls, and what PyTorch's attention makes of them with
W + delta W in place of W."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ext.nn import MultiheadAttention

E, HEADS, N, L, S, RANK = 12, 2, 3, 4, 5, 2
FORMS: dict[str, tuple[str, ...] | None] = {
    "peft": None,
    "qkvo": ("q", "k", "v", "o"),
    "qv": ("q", "v"),
    "k": ("k",),
    "o": ("o",),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim vdim": {"kdim": 7, "vdim": 9, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
each_base = pytest.mark.parametrize("options", BASES.values(), ids=BASES.keys())


def layer_of(
    form: tuple[str, ...] | None = FORMS["qkvo"],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> MultiheadAttention:
    """A layer whose adapters and biases are not zero."""
    torch.manual_seed(0)
    layer = MultiheadAttention(
        E, HEADS, form, RANK, 3, init_lora_weights=False, dtype=dtype, **options
    )
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer


def delta(layer: MultiheadAttention, adapter: str, projection: str) -> Tensor | float:
    """The update of one projection's weight, from its definition."""
    parts = layer.adapter_parameters(adapter)
    end = "" if adapter == "default" else f"_{adapter}"
    prefix = f"{projection}_" if f"{projection}_lora_A{end}" in parts else ""
    if f"{prefix}lora_A{end}" not in parts:
        return 0.0
    A, B = parts[f"{prefix}lora_A{end}"], parts[f"{prefix}lora_B{end}"]
    if not prefix:
        i = "qkv".index(projection)
        B = B[i * E : (i + 1) * E]  # type: ignore[assignment]
    return layer.get_scale(adapter) * (B @ A)


def expected(layer: MultiheadAttention, *args: Tensor, **kw: Any) -> tuple[Tensor, Tensor | None]:
    """PyTorch's attention; differentiable in the parameters of `layer`. Always its slow path."""
    weights = {n: p for n, p in layer.named_parameters() if "lora" not in n}
    for projection in "qkvo":
        update = sum(delta(layer, adapter, projection) for adapter in layer.active_adapters)
        if projection == "o":
            weights["out_proj.weight"] = layer.out_proj.weight + update
        elif layer.in_proj_weight is None:
            name = f"{projection}_proj_weight"
            weights[name] = getattr(layer, name) + update
        else:
            rows = torch.zeros(3, 1, 1, dtype=layer.in_proj_weight.dtype)
            rows["qkv".index(projection)] = 1
            weights["in_proj_weight"] = weights["in_proj_weight"] + (rows * update).expand(
                3, E, E
            ).reshape(3 * E, E)
    plain = copy.deepcopy(layer.get_base_layer())
    y, attention = torch.func.functional_call(plain, weights, args, kw)
    return y, attention


def inputs(options: dict[str, Any], unbatched: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def one(length: int, size: int) -> Tensor:
        batch = () if unbatched else (N,)
        shape = (*batch, length) if options.get("batch_first") else (length, *batch)
        x = torch.randn(*shape, size, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    return one(L, E), one(S, options.get("kdim", E)), one(S, options.get("vdim", E))


def mask(*shape: int) -> Tensor:
    """Hides about a third, but never the first key."""
    hidden = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.35
    hidden[..., 0] = False
    return hidden


CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights per head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "attn_mask": {"attn_mask": mask(L, S)},
    "attn_mask, no weights": {"attn_mask": mask(L, S), "need_weights": False},
    "attn_mask per head": {"attn_mask": torch.randn(N * HEADS, L, S, dtype=torch.float64)},
    "padding, no weights": {"key_padding_mask": mask(N, S), "need_weights": False},
    "both": {"key_padding_mask": mask(N, S), "attn_mask": mask(N * HEADS, L, S)},
    "both, no weights": {
        "key_padding_mask": mask(N, S).double(),
        "attn_mask": mask(L, S).double(),
        "need_weights": False,
    },
}
