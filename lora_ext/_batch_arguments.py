"""What is passed to `lora_ext.batch`: names, numbers and gates, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import as_number, describe, refuse

BASE = "__base__"  # PEFT's name of the model without adapters


def names_of(adapters: Any) -> list[str | None]:
    if adapters is None or isinstance(adapters, str | bytes | Tensor):
        refuse("batch", "adapters", adapters, "a list of names, None for the base")
    try:
        given = list(adapters)
    except TypeError:
        refuse("batch", "adapters", adapters, "a list of names, None for the base")
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
    if not _holds_integers(ids) or ids.dim() not in dims:
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


def rows_of(rows: Any, requests: int, what: str) -> tuple[int, int]:
    """(requests, rows of each)"""
    sizes = list(rows) if isinstance(rows, list | tuple) else []  # also a torch.Size
    if len(sizes) != 2 or not all(_is_integer(size) and size >= 0 for size in sizes):
        refuse("batch", "rows", rows, "two integers, (requests, rows of each)")
    if sizes[0] != requests:
        raise ValueError(
            f"batch: rows: got {tuple(sizes)} with {requests} {what}, expected ({requests}, rows "
            "of each)"
        )
    return int(sizes[0]), int(sizes[1])


def integers(values: Any, argument: str, count: int, none: int | None = None) -> Tensor:
    """int64 [count]; `none` stands for None."""
    expected = f"{count} integers, one for each of adapters"
    if isinstance(values, Tensor):
        found = values.detach().to("cpu")
    else:
        if not isinstance(values, Iterable):
            refuse("batch", argument, values, expected)
        given = [none if value is None else value for value in values]
        if not all(_is_integer(value) for value in given):
            refuse("batch", argument, values, expected)
        found = torch.tensor(given, dtype=torch.int64, device="cpu")
    if not _holds_integers(found) or list(found.shape) != [count]:
        raise ValueError(f"batch: {argument}: got {describe(values)}, expected {expected}")
    return found.to(torch.int64, copy=True)  # the caller's may change


def strengths_of(given: Sequence[Any], where: str = "batch", argument: str = "scale") -> Tensor:
    """float32 [..], of finite numbers."""
    found = [as_number(one, where, argument, "finite numbers") for one in given]
    bad = [number for number in found if not math.isfinite(number)]
    if bad:
        raise ValueError(f"{where}: {argument}: got {bad[0]}, expected finite numbers")
    return torch.tensor(found, dtype=torch.float32, device="cpu")


def _is_integer(value: Any) -> bool:
    """Also a tensor of one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and _holds_integers(value)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _holds_integers(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool:
        return False
    return not (tensor.is_floating_point() or tensor.is_complex())


def not_as_many(where: str, leading: tuple[int, ...], requests: int, gates: bool) -> ValueError:
    """Of an input that has another number of requests than the plan."""
    got = leading[0] if leading else 1
    cure = ""
    if requests and got % requests == 0:
        each = got // requests
        if len(leading) == 1:  # as OPT's fc1 gets them
            cure = (
                f" If these are the tokens of {requests} requests, say so: with "
                f"lora_ext.batch([...], rows=({requests}, {each})): model(...)"
            )
        else:  # as beams get them
            cure = (
                f" If each comes {each} times in a row, as with beams, say so: "
                "lora_ext.batch([...], repeats=True)"
            )
    if gates:
        return ValueError(
            f"{where}: batch: gates: got those of {requests} requests for an input whose "
            f"leading dimensions are {list(leading)}, expected those of {got}.{cure}"
        )
    return ValueError(
        f"{where}: batch: adapters: got {requests} names for an input whose leading dimensions"
        f" are {list(leading)}, expected one name for each of {got}. Length of "
        "`adapter_names` should be the same as the number of inputs, but got "
        f"{requests} and {got} respectively.{cure}"
    )
