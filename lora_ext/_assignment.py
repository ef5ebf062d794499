"""What a plan tells a layer: which rows of its input have which adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """Which rows of one input, counted over all its leading dimensions, have which adapter."""

    names: tuple[str, ...]  # of the adapters that have a row
    order: Tensor  # int32 [R]: the rows of the first name, of the second, ...
    counts: tuple[int, ...]  # how many each has
    factor: Tensor | None  # [R], floating: the strength of each of these rows
    alone: bool  # one adapter has all rows, at its own strength
    # Where rows have several adapters each name's lie by how many other names a row has before it;
    # of each name, how many rows have how many, in pairs (names before, rows). Empty: one each.
    rounds: tuple[int, ...]

    def by_name(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """(name, rows, factor) of each adapter."""
        order = self.order.split_with_sizes(self.counts)
        factors: Sequence[Tensor | None] = [None] * len(order)
        if self.factor is not None:
            factors = self.factor.split_with_sizes(self.counts)
        return list(zip(self.names, order, factors, strict=True))


def copied(of_host: Tensor, device: torch.device) -> Tensor:
    """On the device; nobody waits for it, the stream of a GPU apart.

    Raises:
        RuntimeError: a CUDA graph is captured, whose replays would read the host's memory again.
    """
    if device.type != "cuda" or of_host.device.type != "cpu":
        return of_host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "batch: got a plan whose rows the GPU does not have while a CUDA graph is captured, "
            "expected one that the model has followed before; run the model once within the plan, "
            "on an input of the same shape, and capture then"
        )
    return of_host.pin_memory().to(device, non_blocking=True)


def counts_of(parts: Tensor, k: int, names: int) -> tuple[list[int], tuple[int, ...]]:
    """How many rows each name has, and the rounds of an Assignment. `parts` are sorted: of an entry
    k * its name's place + how many names its row has before it; below 0 are those of none."""
    counts = [0] * names
    rounds: list[int] = []
    runs, lengths = parts.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    for part, rows in zip(runs.tolist(), lengths.tolist(), strict=True):
        if part >= 0:
            counts[part // k] += rows
            rounds += [part % k, rows]
    return counts, tuple(rounds) if any(rounds[::2]) else ()
