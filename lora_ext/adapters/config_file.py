"""adapter_config.json: reading a file that nobody vouches for, and writing it."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

CONFIG_NAME = "adapter_config.json"

# A config with all module names of a large model has some 100 KiB.
MAX_BYTES = 1 << 19
MAX_DEPTH = 32


def read_config(path: Path) -> dict[str, Any]:
    """The object in the file: strict JSON in UTF-8, of at most 512 KiB and 32 levels.

    Raises:
        FileNotFoundError: there is no such regular file.
        ValueError: it holds something else; the message starts with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a {CONFIG_NAME}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: got more than {MAX_BYTES} bytes, expected a {CONFIG_NAME}")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except ValueError as error:  # json.JSONDecodeError is one
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH} levels") from None
    if _is_deep(value):
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def write_config(folder: Path, text: str) -> None:
    """Puts the text into the folder's adapter_config.json: all of it or, on an error, nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CONFIG_NAME}.{secrets.token_hex(8)}"
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(folder / CONFIG_NAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_text(values: dict[str, Any]) -> str:
    """PEFT's layout: keys sorted, two spaces, sets as lists (sorted: PEFT's order is random).

    Raises:
        TypeError, ValueError: a value has no JSON form.
    """
    lists = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in values.items()
    }
    return json.dumps(lists, indent=2, sort_keys=True, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} is there twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _is_deep(value: Any) -> bool:
    """Deep values would overflow the stack of what copies or prints them later."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
    return bool(level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
