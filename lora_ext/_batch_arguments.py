"""What is passed to `lora_ext.batch`: names, numbers and gates, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import describe, refuse

BASE = "__base__"  # PEFT's name of the model without adapters


def names_of(adapters: Any) -> list[str | None]:
    if adapters is None or isinstance(adapters, str | bytes | Tensor):
        refuse("batch", "adapters", adapters, "a list of names, None for the base")
    given = list(adapters)
    for name in given:
        if name is not None and not isinstance(name, str):
            refuse("batch", "adapters", name, "names, or None for the base")
    return [None if name == BASE else name for name in given]


def places_of(given: Sequence[str | None], names: Sequence[str]) -> Tensor:
    places = [-1 if name is None else names.index(name) for name in given]
    return torch.tensor(places, dtype=torch.int64, device="cpu")


def slots_of_gates(gates: Any, given: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """[requests or rows, adapters]: all of them."""
    expected = f"a floating-point tensor [requests, {len(given)}] or [requests, rows, {len(given)}]"
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        refuse("batch", "gates", gates, expected)
    if gates.dim() not in (2, 3) or gates.shape[-1] != len(given):
        raise ValueError(
            f"batch: gates: got shape {list(gates.shape)} with {len(given)} adapters, expected "
            f"{expected}"
        )
    if len(names) < sum(name is not None for name in given):
        raise ValueError(f"batch: adapters: got {list(given)}, expected each name once with gates")
    return places_of(given, names).expand(gates.shape[:-1].numel(), -1)


def slots_of_rows(
    ids: Any, given: Sequence[str | None], names: Sequence[str], gates: Any
) -> Tensor:
    """[rows, adapters of a row]"""
    more = () if gates is None else (1,)
    dims = (1 + len(more), 2 + len(more))
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in dims:
        shapes = "[rows] or [requests, rows]"
        if gates is not None:
            shapes = "[rows, k] or [requests, rows, k] with gates of k adapters for each row"
        refuse("batch", "ids", ids, f"a tensor of integers {shapes}")
    if gates is not None and (
        not isinstance(gates, Tensor) or not gates.is_floating_point() or gates.shape != ids.shape
    ):
        refuse(
            "batch", "gates", gates, f"a floating-point tensor {list(ids.shape)}, one for each id"
        )
    k = 1 if gates is None else ids.shape[-1]
    ids = ids.detach().to("cpu", torch.int64).reshape(-1, k)
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(given):
        bad = int(ids.min()) if int(ids.min()) < -1 else int(ids.max())
        raise ValueError(
            f"batch: ids: got {bad}, expected -1 to {len(given) - 1}, places in adapters"
        )
    slots = torch.cat([places_of(given, names), torch.tensor([-1], device="cpu")])[ids]
    ordered = slots.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(1).nonzero()[0])
        raise ValueError(
            f"batch: ids: got {ids[row].tolist()} in row {row}, the same adapter twice, expected "
            "each once; add its gates up"
        )
    return slots


def integers(values: Any, argument: str, count: int) -> Tensor:
    if isinstance(values, Tensor):
        found = values.detach().to("cpu")
    else:
        try:
            found = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            refuse("batch", argument, values, "integers")
    if found.is_floating_point() or found.dtype == torch.bool or list(found.shape) != [count]:
        raise ValueError(
            f"batch: {argument}: got {describe(values)}, expected {count} integers, one for each "
            "of adapters"
        )
    return found.to(torch.int64)
