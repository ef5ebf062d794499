"""Formats that are one safetensors file: its header is checked before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import (
    FLOATS,
    TensorSpec,
    adapter_bytes,
    open_tensors,
    read_adapter_tensors,
)
from lora_ext.io.atomic import save_files
from lora_ext.io.files import short

HEADER = 8 << 20  # bytes, tens of thousands of tensors; there is no model to compare with


@dataclass(frozen=True)
class Contents:
    """What a file holds, as its header says; no tensor is read yet."""

    path: Path
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]

    def refuse(self, key: str, problem: str) -> NoReturn:
        """AdapterFileError about one tensor."""
        raise AdapterFileError(f"{self.path}: {short(key)}: {problem}")

    def shape(self, key: str, beside: str = "") -> tuple[int, ...]:
        """That of a tensor that has to be there, of floating-point numbers and not empty."""
        if key not in self.specs:
            self.refuse(key, f"is missing{beside and f', beside {short(beside)}'}; copy it again")
        (dtype,) = self.specs[key].dtypes
        if dtype not in FLOATS:
            self.refuse(key, f"got {dtype}, expected floating-point numbers")
        shape = self.specs[key].shape
        if 0 in shape:
            self.refuse(key, f"got shape {list(shape)}, expected a tensor with elements")
        return shape

    def matrix(self, key: str, beside: str = "") -> tuple[int, int]:
        """The shape of a tensor of two dimensions."""
        shape = self.shape(key, beside)
        if len(shape) != 2:
            self.refuse(key, f"got shape {list(shape)}, expected two dimensions")
        return shape[0], shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, on the CPU; NaN and Inf are refused."""
        return read_adapter_tensors(self.path, self.specs)


def file_in(path: Path, name: str | None) -> Path:
    """The file that is meant by a path, which may be a folder with a file of this name."""
    return path / name if name and path.is_dir() else path


def contents(path: Path) -> Contents:
    """Raises AdapterFileError for what is no whole safetensors file, pickles too."""
    if path.is_dir():
        raise AdapterFileError(f"{path}: is a folder, expected a file (.safetensors)")
    with open_tensors(path, max_header_bytes=HEADER) as file:
        if not file.specs:
            raise AdapterFileError(f"{path}: holds no tensor, expected an adapter")
        return Contents(path, file.specs, file.metadata)


def recogniser(
    is_key: Callable[[str], bool], folder_file: str | None = None
) -> Callable[[Path], bool]:
    """Whether a path is a safetensors file with such a key."""

    def recognises(path: Path) -> bool:
        file = file_in(path, folder_file)
        if not file.is_file():
            return False
        status = file.stat()
        state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return any(map(is_key, _keys(file, state)))

    return recognises


@lru_cache(maxsize=1)
def _keys(file: Path, state: tuple[int, ...]) -> tuple[str, ...]:
    """Those of a file in this state, once for all formats that look at it; none where it cannot be
    read, which its reader says then."""
    try:
        return tuple(contents(file).specs)
    except (AdapterFileError, OSError):
        return ()


def size_of(folder_file: str | None = None) -> Callable[[Path], int]:
    """How large the tensors of a file are."""

    def bytes_of(path: Path) -> int:
        with open_tensors(file_in(path, folder_file), max_header_bytes=HEADER) as file:
            return sum(map(file.bytes_of, file.specs))

    return bytes_of


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    folder_file: str | None = None,
) -> None:
    """Writes one file, whole or not at all."""
    if path.suffix != ".safetensors":
        if folder_file is None:
            raise ValueError(f"{path}: this format is one file, expected a name in .safetensors")
        path = path / folder_file
    save_files(path.parent, {path.name: adapter_bytes(tensors, metadata)})


def refuse_others(found: Contents, taken: Iterable[str], expected: str) -> None:
    """AdapterFileError for a key that is none of the format's."""
    known = set(taken)
    for key in found.specs:
        if key not in known:
            found.refuse(key, f"is no tensor of this format ({expected})")
