"""How busy a machine is with other work while it measures."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# Above this share of the CPUs for others, threads that are measured wait for theirs.
_BUSY_SHARE = 0.25
# The load average before a run counts what has ended since, such as a build of our own: alone it
# tells where it is high, or where there is nothing else.
_HIGH_LOAD = 2.0
_BUSY_LOAD = 0.5


class OtherLoad:
    """The CPUs that other processes keep busy, on average since this was made."""

    def __init__(self) -> None:
        self._start = _seconds()

    def cpus(self) -> float | None:
        """None where the system does not tell."""
        now = _seconds()
        if self._start is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return round(max(busy - own, 0.0) / max(wall, 1e-3), 2)


def _seconds() -> tuple[float, float, float] | None:
    """Of the clock; of all CPUs, other than idle; of this process and its ended children."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
        ticks = [int(count) for count in first[1:9]]
    except (OSError, ValueError):
        return None
    if len(ticks) < 8 or not any(ticks):
        return None
    user, nice, system, _idle, _wait, interrupts, soft, stolen = ticks
    busy = user + nice + system + interrupts + soft + stolen
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def is_busy(environment: dict[str, Any]) -> bool:
    """Whether times that were measured in this environment say little."""
    load, other = environment["load_average"], environment.get("other_load")
    cpus = environment["cpus"]
    if other is None:
        return bool(load > _BUSY_LOAD * cpus)
    return bool(other > _BUSY_SHARE * cpus or load > _HIGH_LOAD * cpus)


def describe_load(environment: dict[str, Any]) -> str:
    """In a few words, for captions."""
    text = f"load {environment['load_average']:g} before"
    if (other := environment.get("other_load")) is not None:
        text += f", others used {other:g}"
    text += f" of {environment['cpus']} CPUs"
    return f"{text} (BUSY)" if is_busy(environment) else text


def busy_warning(environment: dict[str, Any]) -> str | None:
    """A sentence for what shows times; None where the machine was quiet."""
    if not is_busy(environment):
        return None
    return f"The machine was busy, so these times say little: {describe_load(environment)}"
