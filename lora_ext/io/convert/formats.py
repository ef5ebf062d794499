"""What a format of adapters is, and what every one is read into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        bytes_of: how large the tensors at a path are; reads none of them.
    """

    about: str
    recognises: Callable[[Path], bool]
    bytes_of: Callable[[Path], int]
    read: Callable[[Path], LoadedAdapter]
    write: Callable[[Path, LoadedAdapter], None]
