"""Formats of adapters: a reader and a writer for each, over one adapter in PEFT's terms."""

from __future__ import annotations

from pathlib import Path

from lora_ext.io.convert.formats import Format, LoadedAdapter
from lora_ext.io.convert.peft import PEFT

__all__ = ["FORMATS", "Format", "LoadedAdapter", "recognised"]

FORMATS = {"peft": PEFT}


def recognised(path: Path) -> str | None:
    """The name of the format; None where it is none of these."""
    return next((name for name, one in FORMATS.items() if one.recognises(path)), None)
