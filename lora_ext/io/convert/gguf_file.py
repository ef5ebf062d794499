"""GGUF files: keys with values, and tensors; see
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The package `gguf` maps a file into memory and trusts its numbers, so the header is checked here,
and tensors are read through the descriptor it was read from, into memory of their own. What a file
holds is the package's: its types, its names, what its quantized blocks mean, and writing.
"""

from __future__ import annotations

import io
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.atomic import save_files
from lora_ext.io.files import naming, open_inside, read_exactly, read_into, short, typed_errors

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had 32-bit lengths
# An adapter has some 20 keys, and two tensors for each matrix of its model.
MAX_HEADER_BYTES = 8 << 20
MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS = 1024, 8192, 1 << 16
MAX_NAME = 63  # what ggml has room for
MAX_DIMENSIONS = 4
# Of the values in a file, by the numbers that say their types.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_UINT32 = 4
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_Q8_0, _Q8_0_VALUES, _Q8_0_BYTES = 8, 32, 34  # a half and 32 codes for 32 values


def library(what: str) -> Any:
    """The package gguf.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package gguf, which is not installed: pip install gguf"
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        shape: as torch has it; files have it the other way round.
        type: its number in files.
        begin, end: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """An open file. From `open_gguf`.

    Attributes:
        values: of its keys; arrays as tuples, longer ones than `MAX_ELEMENTS` left out.
        types: of the elements of arrays, as numbers in files.
        tensors: by name.
    """

    path: str
    values: dict[str, Any]
    types: dict[str, int]
    tensors: dict[str, GgufTensor]
    _file: io.FileIO

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU: in the dtype of the file, Q8_0 as float32.

        Raises:
            AdapterFileError: it has NaN or Inf.
        """
        entry = self.tensors[name]
        with typed_errors(self.path):
            self._file.seek(entry.begin)
            if entry.type == _Q8_0:
                result = self._dequantized(entry)
            else:
                result = torch.empty(entry.shape, dtype=_DTYPES[entry.type], device="cpu")
                read_into(self._file, result.reshape(-1).view(torch.uint8).numpy().data)
        if not bool(torch.isfinite(result).all()):
            raise AdapterFileError(
                f"{self.path}: {short(name)} has NaN or Inf; its training went wrong, or the file "
                "is damaged"
            )
        return result

    def _dequantized(self, entry: GgufTensor) -> Tensor:
        gguf = library("a tensor in Q8_0")
        data = np.empty((*entry.shape[:-1], entry.shape[-1] // _Q8_0_VALUES * _Q8_0_BYTES), "u1")
        read_into(self._file, data.reshape(-1).data)
        values = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """Opens a file, of which the header is read and every number in it checked.

    Raises:
        AdapterFileError: it is no whole and well-formed GGUF file, or has tensors in other types
            than F32, F16, BF16 and Q8_0.
    """
    with typed_errors(path), open_inside(path.parent, path.name) as file:
        size = os.fstat(file.fileno()).st_size
        head = read_exactly(file, min(size, MAX_HEADER_BYTES))
        values, types, tensors = _Header(str(file.name), head, size).parse()
        del head
        yield GgufFile(str(file.name), values, types, tensors, file)


class _Header:
    """What comes before the data, taken off from its start; nothing beyond the file is believed."""

    def __init__(self, path: str, content: bytes, size: int) -> None:
        self._path, self._content, self._size, self._at = path, content, size, 0
        self._elements = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, int], dict[str, GgufTensor]]:
        if self._content[:4] != MAGIC:
            raise self._error("is no GGUF file: it does not begin with GGUF; check the path")
        self._at = 4
        version = self._number("I", "its version")
        if version not in VERSIONS:
            says = f"version {version}"
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                says = "the byte order of big-endian machines"
            raise self._error(f"is GGUF of {says}, expected 2 or 3; convert the adapter again")
        count, keys = (self._number("Q", f"its number of {one}") for one in ("tensors", "keys"))
        self._limit("tensors", count, MAX_TENSORS)
        self._limit("keys", keys, MAX_KEYS)
        values: dict[str, Any] = {}
        types: dict[str, int] = {}
        for _ in range(keys):
            self._value_of_key(values, types)
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            self._info(infos)
        return values, types, self._laid_out(infos, values.get("general.alignment", 32))

    def _value_of_key(self, values: dict[str, Any], types: dict[str, int]) -> None:
        key = self._text("a key")
        if not key or key in values or key in types:
            raise self._error(f"the key {short(key)} is empty or there twice; the file is damaged")
        kind, what = self._number("I", short(key)), short(key)
        if kind != _ARRAY:
            values[key] = self._value(kind, what)
            return
        types[key] = self._number("I", what)
        length = self._number("Q", what)
        if types[key] in _SCALARS:
            code = _SCALARS[types[key]]
            content = self._bytes(length * struct.calcsize(code), what)
            if length <= MAX_ELEMENTS:
                values[key] = struct.unpack(f"<{length}{code}", content)
        elif types[key] == _STRING:
            self._elements += length
            self._limit(f"texts in {what}", self._elements, MAX_ELEMENTS)
            values[key] = self._texts(length, what)
        else:
            raise self._error(f"{what}: is an array of type {types[key]}; the file is damaged")

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._text(what)
        if kind not in _SCALARS:
            raise self._error(
                f"{what}: its type is {kind}, which GGUF does not have; the file is damaged"
            )
        return self._number(_SCALARS[kind], what)

    def _info(self, infos: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        name = self._text("a tensor's name", MAX_NAME)
        what = short(name)
        if not name or name in infos:
            raise self._error(f"the tensor {what} is empty or there twice; the file is damaged")
        dimensions = self._number("I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(
                f"{what}: has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        sizes = [self._number("Q", what) for _ in range(dimensions)]
        if not all(sizes) or math.prod(sizes) >= 1 << 62:
            raise self._error(f"{what}: its shape is {sizes[::-1]}; the file is damaged")
        infos[name] = tuple(sizes[::-1]), self._number("I", what), self._number("Q", what)

    def _laid_out(
        self, infos: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: Any
    ) -> dict[str, GgufTensor]:
        """Tensor after tensor, each at a multiple of the alignment, up to the end of the file."""
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & alignment - 1:
            raise self._error(
                f"'general.alignment' is {short(str(alignment))}, expected a power of two"
            )
        start, position = _aligned(self._at, alignment), 0
        tensors = {}
        for name, (shape, kind, offset) in infos.items():
            what = short(name)
            if offset != position:
                raise self._error(
                    f"{what}: its data is at {offset}, expected {position}; the file is damaged"
                )
            end = start + offset + self._nbytes(what, shape, kind)
            if end > self._size:
                raise self._error(
                    f"{what}: its data ends at byte {end} of {self._size}; the file is damaged, or "
                    "not all of it was copied"
                )
            tensors[name] = GgufTensor(name, shape, kind, start + offset, end)
            position = _aligned(end - start, alignment)
        rest = self._size - start - position
        if rest > 0:
            raise self._error(f"{rest} bytes after the last tensor; the file is damaged")
        return tensors

    def _nbytes(self, what: str, shape: tuple[int, ...], kind: int) -> int:
        if kind in _DTYPES:
            return math.prod(shape) * _DTYPES[kind].itemsize
        if kind != _Q8_0:
            raise self._error(
                f"{what}: is of type {kind}, expected F32 (0), F16 (1), BF16 (30) or Q8_0 (8), "
                "which adapters are made in; convert the adapter again"
            )
        if shape[-1] % _Q8_0_VALUES:
            raise self._error(f"{what}: rows of {shape[-1]} in Q8_0, expected a multiple of 32")
        return math.prod(shape) // _Q8_0_VALUES * _Q8_0_BYTES

    def _bytes(self, count: int, what: str) -> bytes:
        begin, self._at = self._at, self._at + count
        if self._at > len(self._content):
            if self._at <= self._size:
                raise self._error(
                    f"{what}: ends more than {MAX_HEADER_BYTES} bytes after the file's begin; an "
                    "adapter's header is shorter"
                )
            raise self._error(f"{what}: ends after the file; it is damaged, or not all was copied")
        return self._content[begin : self._at]

    def _number(self, code: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(code), what))
        return value

    def _text(self, what: str, limit: int | None = None) -> str:
        length = self._number("Q", what)
        if limit is not None and length > limit:
            raise self._error(f"{what} has {length} bytes, expected at most {limit}")
        return self._decoded(self._bytes(length, what), what)

    def _texts(self, count: int, what: str) -> tuple[str, ...]:
        """A tokenizer's are many, and `_text` of each would take three times as long."""
        content, at, texts = self._content, self._at, []
        length_at, size = struct.Struct("<Q").unpack_from, len(content)
        for _ in range(count):
            begin = at + 8
            end = begin + length_at(content, at)[0] if begin <= size else begin
            if end > size:
                self._at = at
                self._text(what)  # says what is missing
            texts.append(content[begin:end])
            at = end
        self._at = at
        return tuple(self._decoded(text, what) for text in texts)

    def _decoded(self, text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what}: is no text in UTF-8; the file is damaged") from error

    def _limit(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise self._error(f"has {count} {what}, expected at most {limit} in an adapter")

    def _error(self, says: str) -> AdapterFileError:
        return AdapterFileError(f"{self._path}: {says}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def write_gguf(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file as one unit: what is there of that name is replaced, or left as it was.

    Args:
        values: texts, floats as float32, tuples of numbers as arrays of uint32.
        tensors: in float32, float16 or bfloat16.
    """
    if path.is_dir():
        raise AdapterFileError(f"{path}: is a folder, expected the name of a file")
    gguf = library(f"writing {path}")
    with tempfile.TemporaryDirectory(prefix="lora_ext-") as folder, naming(folder):
        writer = gguf.GGUFWriter(Path(folder, "gguf"), architecture)
        for key, value in values.items():
            if isinstance(value, tuple):
                kinds = gguf.GGUFValueType
                writer.add_key_value(key, list(value), kinds.ARRAY, kinds.UINT32)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_string(key, value)
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            if tensor.dtype is torch.bfloat16:  # which numpy has not
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=kind)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = Path(folder, "gguf").read_bytes()
    save_files(path.parent, {path.name: content})
