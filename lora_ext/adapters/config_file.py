"""adapter_config.json: reading a file that nobody vouches for, and writing it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from lora_ext.errors import AdapterFileError
from lora_ext.io.files import parse_json

CONFIG_NAME = "adapter_config.json"

# A config with all module names of a large model has some 100 KiB.
MAX_BYTES = 1 << 19


def read_config(path: Path) -> dict[str, Any]:
    """The object in the file, of at most 512 KiB; see `lora_ext.io.files.parse_json`.

    Raises:
        FileNotFoundError: there is no such regular file.
        AdapterFileError: it holds something else; the message starts with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a {CONFIG_NAME}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise AdapterFileError(f"{path}: got more than {MAX_BYTES} bytes, expected a {CONFIG_NAME}")
    return parse_json(content, str(path))


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
