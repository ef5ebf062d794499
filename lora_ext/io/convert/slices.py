"""loralib's MergedLinear: updates of some slices of a fused projection's rows, as one of them all.

Its lora_A [n r, in] holds the enabled slices' one after the other, as does lora_B [rows, r]. Here
lora_A stays and lora_B becomes block-diagonal, [out, n r], with zeros for what has no update; with
lora_alpha n times as large the scaling is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext.errors import AdapterFileError


@dataclass(frozen=True)
class Slices:
    """Rows of each slice, and whether it has an update."""

    sizes: tuple[int, ...]
    enabled: tuple[bool, ...]

    @property
    def count(self) -> int:
        return sum(self.enabled)

    @property
    def rows(self) -> int:
        return sum(n for n, own in zip(self.sizes, self.enabled, strict=True) if own)


def slices_of(given: Iterable[Any], where: str, *, rows: int = 0, out: int = 0) -> Slices:
    """What a caller says of slices: flags, or (rows, flag) of each.

    Args:
        rows: of lora_B, which slices of one size share; or
        out: those of the weight.
    """
    given = list(given)
    if given and all(isinstance(one, list | tuple) and len(one) == 2 for one in given):
        sizes, flags = [one[0] for one in given], [one[1] for one in given]
    else:
        sizes, flags = [], given
    if not given or not all(one in (True, False) for one in flags) or not any(flags):
        raise AdapterFileError(
            f"{where}: slices: got {given!r:.80}, expected True or False for each slice of the "
            "rows, or (rows, True or False), with one True"
        )
    enabled = tuple(map(bool, flags))
    if not sizes:
        count, total = (sum(enabled), rows) if rows else (len(enabled), out)
        if total % count:
            raise AdapterFileError(
                f"{where}: {total} rows are not {count} slices of one size; give (rows, True or "
                "False) for each slice"
            )
        sizes = [total // count] * len(enabled)
    if not all(type(size) is int and size > 0 for size in sizes) or sum(sizes) > 1 << 31:
        raise AdapterFileError(f"{where}: slices: got {sizes!r:.80}, expected numbers of rows")
    found = Slices(tuple(sizes), enabled)
    if (rows and found.rows != rows) or (out and sum(found.sizes) != out):
        got = f"lora_B has {rows}" if rows else f"the weight has {out}"
        raise AdapterFileError(
            f"{where}: slices of {list(found.sizes)} rows, {list(enabled)}: {got}; give those of "
            "the layer's enable_lora"
        )
    return found


def block_diagonal(B: Tensor, slices: Slices) -> Tensor:
    """[rows, r] → [out, n r]."""
    wide = B.new_zeros(sum(slices.sizes), slices.count * B.shape[1])
    for row, own, column, size in _blocks(slices, B.shape[1]):
        wide[row : row + size, column : column + B.shape[1]] = B[own : own + size]
    return wide


def blocks_of(wide: Tensor, slices: Slices) -> Tensor | None:
    """[out, n r] → [rows, r]; None where it is not zero outside of its blocks."""
    r = wide.shape[1] // slices.count
    B = wide.new_zeros(slices.rows, r)
    for row, own, column, size in _blocks(slices, r):
        B[own : own + size] = wide[row : row + size, column : column + r]
    return B if torch.equal(block_diagonal(B, slices), wide) else None


def _blocks(slices: Slices, r: int) -> Iterable[tuple[int, int, int, int]]:
    """(row of the weight, row of lora_B, column, rows) of each enabled slice."""
    row = own = column = 0
    for size, enabled in zip(slices.sizes, slices.enabled, strict=True):
        if enabled:
            yield row, own, column, size
            own, column = own + size, column + r
        row += size
