"""What a format of adapters is, what every one is read into, and what a caller says of a file that
the file does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
class Layer:
    """A module of the base, as far as it is known.

    Attributes:
        kind: "linear", "embedding", "conv" or "attention"; None is not known.
        shape: of its weight, as the module stores it.
        groups: of a convolution.
    """

    kind: str | None = None
    shape: tuple[int, ...] | None = None
    groups: int = 1


@dataclass(frozen=True)
class Options:
    """What a format's file leaves open, and the caller knows. Each format says what it asks for.

    Attributes:
        alpha: lora_alpha of all modules, where a file holds none.
        modules: those of the base, by name.
        slices: which parts of a fused projection's rows have an adapter (loralib's `enable_lora`),
            by a module's name or its last parts: True or False for parts of one size, or
            (rows, True or False) for each.
        ids: the field that a number in a file's names stands for, by that number or by "PREFIX.ID".
        component: of a pipeline, such as "unet": it alone, without this prefix.
        base: folder of the model that the adapter is for; its config.json is read, and the headers
            of its safetensors.
    """

    alpha: float | None = None
    modules: Mapping[str, Layer] = field(default_factory=dict)
    slices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    component: str | None = None
    base: Path | None = None


@dataclass(frozen=True)
class Format:
    """How a format is told, read and written.

    Attributes:
        about: for --help.
        recognises: whether what is at a path is of this format; reads no tensor.
        bytes_of: how large the tensors at a path are; reads none of them.
        read: what is at a path.
        write: to a folder, or to the file of a format that is one file.
    """

    about: str
    recognises: Callable[[Path], bool]
    bytes_of: Callable[[Path], int]
    read: Callable[[Path, Options], LoadedAdapter]
    write: Callable[[Path, LoadedAdapter, Options], None]
