"""The formats that `convert` reads and writes; another one is one more entry in FORMATS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in PEFT's terms, which every format is read into and written from.

    Attributes:
        config: the fields of adapter_config.json.
        tensors: by PEFT's keys.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """How a format is told, read and written.

    Attributes:
        about: for --help.
        recognises: whether what is at a path is of this format; reads no tensor.
    """

    about: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], LoadedAdapter]
    write: Callable[[Path, LoadedAdapter], None]


# Of an adapter of PEFT's, also those that are not read.
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def _read_peft(folder: Path) -> LoadedAdapter:
    from lora_ext.cli.adapters import HEADER, check_memory
    from lora_ext.io import open_adapter

    with open_adapter(folder) as files:
        header = files.header(max_header_bytes=HEADER)
        file = files.open_tensors(max_header_bytes=HEADER)
        # The tensors, those in the new dtype, and the bytes of the file.
        check_memory(3 * sum(map(file.bytes_of, file.specs)), f"converting {folder}")
        return LoadedAdapter(files.config, files.tensors(header))


def _write_peft(folder: Path, adapter: LoadedAdapter) -> None:
    from lora_ext.io import save_adapter

    save_adapter(folder, adapter.config, adapter.tensors)


FORMATS = {
    "peft": Format(
        about="adapter_config.json and adapter_model.safetensors",
        # Also one of the two, or with pickled weights: reading says what is wrong then, and
        # nothing of it is replaced unasked.
        recognises=lambda path: any((path / name).exists() for name in _FILES),
        read=_read_peft,
        write=_write_peft,
    ),
}


def recognised(path: Path) -> str | None:
    """The name of the format; None where it is none of these."""
    return next((name for name, one in FORMATS.items() if one.recognises(path)), None)
