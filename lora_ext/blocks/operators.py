"""The operators of several layers that belong together, as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_ext._layer_lists import call_of_layers, refuse_layers
from lora_ext.arguments import refuse
from lora_ext.functional import lora_linear_multi

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


def lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None] | None = None,
    *,
    activation: Activation = "silu",
    scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    rng_states: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> Tensor:
    """`down(f(gate(x)) * up(x))`, an MLP with a gate (SwiGLU, GEGLU: Shazeer, 2020,
    arXiv:2002.05202) of three `lora_linear`, as one operator that keeps half for backward.

    The layers are gate, up and down, in this order in every list; or two, where one layer of twice
    the width makes what gate makes and, behind it, what up makes (Phi-3's gate_up_proj). Values and
    masks, gradients too, are those of the layers one by one, `f` and the product being
    torch.nn.functional's; but for the gradient of x, which is one sum over gate and up, as in
    `lora_linear_multi`. Kept for backward are x, what gate and up made, and without dropout
    `x @ lora_A.T` of each: f's values and the product, which layers one by one keep, are made
    again. Differentiable twice.

    Args:
        x: [..., in_features], as for `lora_linear`.
        weights: [inner, in_features] of gate and of up, or [2 inner, in_features] of both; and
            [out_features, inner] of down.
        biases, lora_As, lora_Bs, lora_biases, scalings, dropout_p, rng_states: of each, as for
            `lora_linear_multi`; layers whose lora_A and lora_B are None have no adapter.
        activation: f: "silu", "gelu", "gelu_tanh" (gelu with approximate="tanh"), "relu", or
            "relu2", its square.
        recompute: keep x alone, and make what gate and up made again in backward: their products
            once more.

    Returns:
        [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        As `lora_linear_multi`; ValueError for another activation, or sizes that do not fit.
    """
    if not isinstance(recompute, bool):  # the dispatcher takes None, too
        refuse("lora_mlp", "recompute", recompute, "True or False")
    try:
        layers = call_of_layers(
            x, weights, biases, lora_As, lora_Bs, lora_biases, scalings, dropout_p, rng_states
        )
        return torch.ops.lora_ext.lora_mlp(  # type: ignore[no-any-return]
            *layers, activation, recompute
        )
    except (TypeError, ValueError, RuntimeError, AttributeError):
        if not isinstance(activation, str):
            refuse("lora_mlp", "activation", activation, "a name, such as 'silu'")
        given = {"lora_As": lora_As, "lora_Bs": lora_Bs, "biases": biases}
        given |= {"lora_biases": lora_biases, "rng_states": rng_states}
        refuse_layers("lora_mlp", x, weights, given, scalings, dropout_p)
        raise


def lora_qkv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    rng_states: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one x: `lora_linear_multi` of three layers, whose widths may differ (grouped
    queries).

    x [..., in_features], of each layer [out_features, in_features] and as for `lora_linear_multi`
    → [..., out_features] of each.

    Raises:
        As `lora_linear_multi`; ValueError for more or fewer than three layers.
    """
    if len(weights) != 3:
        raise ValueError(f"lora_qkv: weights: got {len(weights)} entries, expected 3: q, k and v")
    try:
        q, k, v = lora_linear_multi(
            x,
            weights,
            biases,
            lora_As,
            lora_Bs,
            lora_biases,
            scalings=scalings,
            dropout_p=dropout_p,
            rng_states=rng_states,
        )
    except (TypeError, ValueError) as error:
        text = str(error)
        for i, layer in enumerate(("q", "k", "v")):
            text = text.replace(f"lora_linear_multi: layer {i}:", f"lora_qkv: {layer}:")
        raise type(error)(text.replace("lora_linear_multi:", "lora_qkv:")) from None
    return q, k, v
