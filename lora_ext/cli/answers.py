"""What commands answer: as text, or with --json as one object, and with an exit code."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        data: what --json prints; the keys are documented in docs/cli.md.
        text: what is printed else.
        ok: False where the answer is no, or a problem was found: exit code 1.
    """

    data: dict[str, Any]
    text: str
    ok: bool = True


def telling(command: Callable[..., Answer]) -> Callable[..., int]:
    """A command's function, which returns an Answer, with --json; the exit code is what it
    returns then. What it raises is `main`'s to tell."""

    @click.option("--json", "as_json", is_flag=True, help="Answer with one JSON object.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> int:
        answer = command(*args, **kwargs)
        if as_json:
            print_json(answer.data)
        else:
            click.echo(_printable(answer.text))
        return 0 if answer.ok else 1

    return run


def print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not: null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[object]], heads: Sequence[str] = ()) -> str:
    """Columns that are as wide as their widest entry."""
    lines = [list(heads), *rows] if heads else list(rows)
    cells = [[one_line(str(one)) for one in line] for line in lines]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def one_line(text: str) -> str:
    """What a file says, without line breaks that could pass for lines of the answer."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _printable(text: str) -> str:
    """What a file says is no control sequence of the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size(count: int) -> str:
    """Bytes, readable."""
    number, units = float(count), ["GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count} B"
    number /= 1024
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    return f"{number:.1f} {units[-1]}"
