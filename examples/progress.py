"""Progress of long loops: a bar on a terminal, a line every ten seconds anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")
SECONDS = 10.0  # between two lines


def track(items: Sequence[T], what: str, console: Console, seconds: float = SECONDS) -> Iterator[T]:
    """The items, one after the other; rich's own bar prints nothing into a pipe or a log."""
    if console.is_terminal:
        yield from rich.progress.track(items, what, console=console, transient=True)
        return
    began = told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= seconds or done == len(items):
            left = (now - began) / done * (len(items) - done)
            rest = f", about {left:.0f} s to go" if left else ""
            console.print(f"   {what}: {done} of {len(items)} after {now - began:.0f} s{rest}")
            told = now
