"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0  # seconds between lines


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """What the block calls with the amount done since the last call.

    Args:
        what: the work, "Reading adapter".
        total: the amount of all of it; None where nobody knows.
    """
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
        return
    done, ended, begin = [0], threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY):
            share = f", {done[0] / total:.0%}" if total else ""
            print(f"{what}: {time.monotonic() - begin:.0f} s{share}", file=sys.stderr, flush=True)

    def advance_count(amount: int) -> None:
        done[0] += amount

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield advance_count
    finally:
        ended.set()
        teller.join()


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
