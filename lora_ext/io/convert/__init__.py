"""Formats of adapters: a reader and a writer for each, over one adapter in PEFT's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ext.arguments import as_path, check_known
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import Format, Layer, LoadedAdapter, Options
from lora_ext.io.convert.gguf import GGUF
from lora_ext.io.convert.peft import PEFT
from lora_ext.io.files import StrPath

__all__ = ["FORMATS", "Format", "Layer", "LoadedAdapter", "Options", "convert", "recognised"]

FORMATS = {"peft": PEFT, "gguf": GGUF}


def recognised(path: Path) -> str | None:
    """The name of the format; None where it is none of these."""
    return next((name for name, one in FORMATS.items() if one.recognises(path)), None)


def convert(
    source_path: StrPath,
    out: StrPath,
    *,
    source: str | None = None,
    target: str = "peft",
    **options: Any,
) -> LoadedAdapter:
    """Reads an adapter in one format and writes it in another.

    Args:
        source_path: the folder or file it is in.
        out: the folder, or file, that is written; what is there of an adapter is replaced.
        source, target: names in `FORMATS`; source None: recognised.
        options: those of `Options`, for both.

    Returns:
        The adapter in PEFT's terms.

    Raises:
        AdapterFileError: it cannot be read, or the target cannot hold it.
        ValueError: something that the file does not say has to be given.
    """
    path, out = as_path(source_path, "convert", "source_path"), as_path(out, "convert", "out")
    name = source if source is not None else recognised(path)
    if name is None:
        raise AdapterFileError(
            f"{path}: is no adapter in a known format ({', '.join(FORMATS)}); name it with source="
        )
    check_known("convert", "source and target", (name, target), FORMATS)
    given = Options(**options)
    adapter = FORMATS[name].read(path, given)
    FORMATS[target].write(out, adapter, given)
    return adapter
