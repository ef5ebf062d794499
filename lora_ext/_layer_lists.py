"""Operators with an entry for each layer in lists: their arguments, and what is refused after a
call failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._dropout import draw_rng_state
from lora_ext._scaling import is_for_any
from lora_ext.arguments import check_kinds, refuse


def for_each(value: Any, layers: Sequence[object]) -> Sequence[Any]:
    """A list with an entry for each, of one or of one for all."""
    return value if isinstance(value, list | tuple) else [value] * len(layers)


def call_of_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None] | None,
    scalings: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float],
    rng_states: Sequence[Tensor | None] | None,
) -> tuple[Any, ...]:
    """The arguments of an operator of torch.ops; states that are missing are drawn."""
    numbers, p = for_each(scalings, weights), for_each(dropout_p, weights)
    states = [
        draw_rng_state(x) if state is None and q > 0.0 and A is not None else state
        for state, q, A in zip(rng_states or [None] * len(weights), p, lora_As, strict=True)
    ]
    empty = x.new_empty(0)

    def listed(tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
        return [empty if one is None else one for one in tensors or ()]

    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors: list[Tensor | None] = [
        one
        if isinstance(one, Tensor)
        else torch.ones((), dtype=exact, device=x.device) * one
        if is_for_any(one)
        else None
        for one in numbers
    ]
    return (
        x,
        weights,
        listed(biases),
        listed(lora_As),
        listed(lora_Bs),
        listed(lora_biases),
        [1.0 if tensor is not None else one for one, tensor in zip(numbers, tensors, strict=True)],
        listed(tensors),
        p,
        listed(states),
    )


def refuse_layers(
    where: str,
    x: object,
    weights: object,
    optional: Mapping[str, object],
    numbers: object,
    p: object,
) -> None:
    """After a call failed: an error for the first argument of another kind or length. Of `optional`
    None is none for all, but for the adapters'."""
    layers = 0
    check_kinds(where, x=x)
    lists = {
        name: entries
        for name, entries in optional.items()
        if entries is not None or name in ("lora_As", "lora_Bs")
    }
    for name, entries in {"weights": weights, **lists}.items():
        if not isinstance(entries, Sequence | torch.nn.ParameterList) or isinstance(entries, str):
            refuse(where, name, entries, "a list with an entry for each layer")
        layers = layers or len(entries)
        if len(entries) != layers:
            raise ValueError(
                f"{where}: {name}: got {len(entries)} entries, expected {layers}, one for each of "
                "weights"
            )
        for i, entry in enumerate(entries):
            if entry is not None or name == "weights":
                check_kinds(where, **{f"{name}[{i}]": entry})
    for name, several in (("scalings", numbers), ("dropout_p", p)):
        if isinstance(several, list | tuple) and len(several) != layers:
            raise ValueError(
                f"{where}: {name}: got {len(several)} entries, expected {layers}, one for each of "
                "weights, or one for all"
            )
    if layers == 0:
        raise ValueError(f"{where}: weights: got no layers, expected at least one")
    for number in numbers if isinstance(numbers, list | tuple) else [numbers]:
        if not isinstance(number, Tensor):
            check_kinds(where, scalings=number)
    for probability in p if isinstance(p, list | tuple) else [p]:
        check_kinds(where, dropout_p=probability)
