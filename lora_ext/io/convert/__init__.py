"""Formats of adapters: a reader and a writer for each, over one adapter in PEFT's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_ext.arguments import as_path, check_known, check_names, names_of
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.candle import CANDLE
from lora_ext.io.convert.diffusers import DIFFUSERS
from lora_ext.io.convert.formats import Format, Layer, LoadedAdapter, Options, layers_of
from lora_ext.io.convert.gguf import GGUF
from lora_ext.io.convert.kohya import KOHYA
from lora_ext.io.convert.loralib import LORALIB
from lora_ext.io.convert.loratorch import LORATORCH
from lora_ext.io.convert.pairs import PREFIX
from lora_ext.io.convert.peft import PEFT, is_of_folder
from lora_ext.io.convert.tensor_file import contents
from lora_ext.io.files import StrPath, short

__all__ = [
    "FORMATS",
    "Format",
    "Layer",
    "LoadedAdapter",
    "Options",
    "convert",
    "format_of",
    "layers_of",
    "recognised",
]

FORMATS = {
    "peft": PEFT,
    "loralib": LORALIB,
    "loratorch": LORATORCH,
    "candle": CANDLE,
    "diffusers": DIFFUSERS,
    "kohya": KOHYA,
    "gguf": GGUF,
}


_BEFORE = re.compile(r"\.(?:[qkv]_)?lora_")  # what a key has after the module's name
_ARGUMENTS = ("source", "target", "alpha", "slices", "ids", "modules", "base", "component")


def recognised(path: Path) -> str | None:
    """The name of the format; None where it is none of these."""
    return next((name for name, one in FORMATS.items() if one.recognises(path)), None)


def format_of(path: Path) -> str:
    """The name of the format.

    Raises:
        AdapterFileError: it is none of these; says why a file is no safetensors file at all.
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: is not there, expected an adapter's file or folder")
    name = recognised(path)
    pickle = path / "pytorch_lora_weights.bin"  # of diffusers, before it wrote safetensors
    if name is None and (path.is_file() or pickle.is_file()):
        contents(path if path.is_file() else pickle)
    if name is None and is_of_folder(path):
        raise AdapterFileError(f"{path}: is one file of an adapter of PEFT's; give its folder")
    if name is None:
        raise AdapterFileError(
            f"{path}: is no adapter in a known format ({', '.join(FORMATS)}); say which one it is "
            "meant to be (source=, --from)"
        )
    return name


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
        options: those of `Options`, for both; `modules` may be the base itself, or its modules'
            names.

    Returns:
        The adapter in PEFT's terms.

    Raises:
        AdapterFileError: it cannot be read, or the target cannot hold it.
        ValueError: something that the file does not say has to be given.
    """
    path, out = as_path(source_path, "convert", "source_path"), as_path(out, "convert", "out")
    name = source if source is not None else format_of(path)
    check_known("convert", "source and target", (name, target), FORMATS)
    check_names("convert", options, _ARGUMENTS)
    given = _options(**options)
    check_asked(given, name, target)
    adapter = read(path, name, given)
    FORMATS[target].write(out, adapter, given)
    return adapter


def check_asked(options: Options, source: str, target: str) -> None:
    """ValueError for an option that neither format takes: it would go unused without a word."""
    for option in ("alpha", "slices", "ids", "component"):
        takers = [name for name, one in FORMATS.items() if option in one.asks]
        if getattr(options, option) not in (None, {}) and not {source, target} & set(takers):
            raise ValueError(
                f"convert: {option}: is for {', '.join(takers)}, and this is {source} to {target}; "
                "leave it out, or say the format (source=, target=; --from, --to)"
            )


def check_slices(options: Options, adapter: LoadedAdapter, where: str) -> None:
    """AdapterFileError for slices of what is no module of the adapter."""
    names = {_BEFORE.split(key.removeprefix(PREFIX))[0] for key in adapter.tensors}
    for end in options.slices:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            raise AdapterFileError(
                f"{where}: slices: {short(end)} is neither the name nor the last parts of the name "
                "of a module with an adapter"
            )


def read(path: Path, source: str, options: Options) -> LoadedAdapter:
    """What is at a path, in the format that a caller says it is in, or that it was recognised as.

    Raises:
        AdapterFileError: it cannot be read; says so where it looks like another format's.
    """
    try:
        adapter = FORMATS[source].read(path, options)
        check_slices(options, adapter, str(path))
        return adapter
    except AdapterFileError as error:
        other = recognised(path)
        if other in (None, source):
            raise
        raise AdapterFileError(
            f"{error}; it looks like {other}, not {source}: leave source= (--from) out"
        ) from error


def _options(modules: Any = (), **others: Any) -> Options:
    whole = not isinstance(modules, Mapping)
    if isinstance(modules, nn.Module):
        modules = layers_of(modules)
    elif whole:
        modules = dict.fromkeys(names_of(modules, "convert", "modules"), Layer())
    return Options(modules=modules, whole=whole and bool(modules), **others)
