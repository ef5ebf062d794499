"""Adapter tensors in the safetensors format: checked before anything of their size is allocated.

A safetensors file is the length of a header (8 bytes, little endian), the header (JSON: key to
dtype, shape and data_offsets) and the tensors' bytes, without gaps; see
https://github.com/huggingface/safetensors#format.

The tensors are read through the descriptor whose header was checked, into memory of their own, not
mapped: a file that is replaced, cut or overwritten meanwhile can neither crash the process nor
change a tensor after its check. Little-endian machines only, as the rest of this package.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lora_ext.arguments import as_path, check_mapping
from lora_ext.errors import AdapterFileError
from lora_ext.io.files import (
    StrPath,
    open_inside,
    parse_json,
    read_exactly,
    read_into,
    short,
    typed_errors,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = frozenset(dtype for dtype in DTYPES.values() if dtype.is_floating_point)

MAX_HEADER_BYTES = 512 << 10  # without a model to compare with: some 3,500 tensors
MAX_METADATA_BYTES = 256 << 10
MAX_DIMENSIONS = 8
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
PICKLE = (
    "is a pickle, which can run code when it is read, so it is never loaded; where you trust it, "
    "convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
    "'adapter_model.safetensors')"
)
# What else is found under this name, by its first bytes.
SIGNATURES = {
    b"PK\x03\x04": PICKLE,
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"version ": "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"GGUF": "is a GGUF file; give the safetensors file it was made from",
    b"{": "is JSON, as an index of shards or a config; give the folder that it is in",
    b"<": "is a web page, not the file itself; download it again",
}


@dataclass(frozen=True)
class TensorSpec:
    """What a file has to hold, or does hold, under one key.

    Attributes:
        shape: the exact sizes.
        dtypes: those allowed; exactly one where it describes a file.
        held_in: that of the parameter which gets the values, if it may be a narrower one.
    """

    shape: tuple[int, ...]
    dtypes: frozenset[torch.dtype] = FLOATS
    held_in: torch.dtype | None = None


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True)
class _Header:
    entries: dict[str, _Entry]
    data_start: int  # bytes from the start of the file
    metadata: dict[str, str]


def read_header(
    source: StrPath | io.FileIO, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorSpec]:
    """Key to shape and dtype, without reading a tensor.

    Args:
        source: a path (a link must not leave its folder), or an open, unbuffered file.
        max_header_bytes: a longer header is refused unread.

    Raises:
        AdapterFileError: no whole and well-formed safetensors file.
    """
    with _opened(source, "read_header") as file:
        entries = _read_header(file, max_header_bytes).entries
    return {k: TensorSpec(entry.shape, frozenset({entry.dtype})) for k, entry in entries.items()}


def header_limit(keys: Iterable[str]) -> int:
    """Bytes that the header of a file with these keys can have."""
    # 6 bytes per character: JSON may write any of them as \uXXXX.
    return MAX_METADATA_BYTES + sum(256 + 6 * len(key) for key in keys)


def read_adapter_tensors(
    source: StrPath | io.FileIO,
    expected: Mapping[str, TensorSpec],
    left_out: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, in the order of `expected`.

    Nothing is allocated before the header was checked and found to hold exactly the keys, shapes
    and dtypes that are expected; a header longer than they justify is not read either.

    Args:
        source: a path (a link must not leave its folder), or an open, unbuffered file.
        expected: every key that has to be there.
        left_out: keys that may be there, too, and are not read.

    Raises:
        AdapterFileError: no whole and well-formed safetensors file; an unknown or missing key;
            another shape or dtype than expected; NaN or Inf in a floating-point tensor, or a value
            that would be one in the dtype that is to hold it.
    """
    where = "read_adapter_tensors"
    check_mapping(where, "expected", expected, TensorSpec, "TensorSpecs")
    with _opened(source, where) as file:
        header = _read_header(file, header_limit([*expected, *left_out]))
        read = {key: one for key, one in header.entries.items() if key not in left_out}
        _compare(file.name, read, expected)
        return {key: _read_tensor(file, header, key, spec) for key, spec in expected.items()}


class TensorFile:
    """An open safetensors file whose tensors are read one by one, in blocks where they may be of
    any size; NaN and Inf as they are. From `open_tensors`.

    Attributes:
        path: the file's.
        specs: shape and dtype by key, in the order of the data.
        metadata: the texts that its header holds beside them.
    """

    def __init__(self, file: io.FileIO, max_header_bytes: int) -> None:
        self._file, self._header = file, _read_header(file, max_header_bytes)
        self.path, self.metadata = str(file.name), self._header.metadata
        entries = sorted(self._header.entries.items(), key=lambda item: item[1].begin)
        self.specs = {k: TensorSpec(one.shape, frozenset({one.dtype})) for k, one in entries}

    def bytes_of(self, key: str) -> int:
        """The size of a tensor's data."""
        entry = self._header.entries[key]
        return entry.end - entry.begin

    def blocks(self, key: str, elements: int = 1 << 18) -> Iterator[Tensor]:
        """A tensor's elements, flat, at most so many at a time: memory stays small whatever size
        a header claims."""
        entry = self._header.entries[key]
        count, place = math.prod(entry.shape), self._header.data_start + entry.begin
        for begin in range(0, count, elements):
            block = torch.empty(min(elements, count - begin), dtype=entry.dtype, device="cpu")
            with typed_errors(self.path):
                self._file.seek(place + begin * entry.dtype.itemsize)
                read_into(self._file, block.view(torch.uint8).numpy().data)
            yield block

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on the CPU."""
        entry = self._header.entries[key]
        with typed_errors(self.path):
            return _read_data(self._file, self._header, entry)


@contextmanager
def open_tensors(
    source: StrPath | io.FileIO, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> Iterator[TensorFile]:
    """Opens a safetensors file, whatever it holds; arguments and errors as of `read_header`."""
    with _opened(source, "open_tensors") as file:
        yield TensorFile(file, max_header_bytes)


def adapter_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The safetensors file of these tensors, byte for byte as PEFT writes it.

    Aliases and strided views are copied first, since the format knows neither.

    Args:
        tensors: by their keys.
        metadata: further texts for the header.

    Raises:
        AdapterFileError: NaN or Inf: it would replace a good file and could not be loaded.
    """
    check_mapping("adapter_bytes", "tensors", tensors, Tensor, "tensors")
    ready: dict[str, Tensor] = {}
    storages: set[tuple[torch.device, int]] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        check_finite(key, tensor)
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if storage in storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)
        ready[key] = tensor.contiguous()
    return safetensors.torch.save(ready, metadata={"format": "pt", **(metadata or {})})


def check_finite(key: str, tensor: Tensor) -> None:
    """AdapterFileError for what would not be read again."""
    if not _is_finite(tensor.detach()):
        raise AdapterFileError(f"{short(key)} has NaN or Inf; it is not saved")


@contextmanager
def _opened(source: StrPath | io.FileIO, where: str) -> Iterator[io.FileIO]:
    if isinstance(source, io.FileIO):
        _refuse_pickle_name(source.name)
        with typed_errors(source.name):
            yield source
        return
    path = as_path(source, where, "source")
    _refuse_pickle_name(path)
    with typed_errors(path), open_inside(path.parent, path.name) as file:
        yield file


def _refuse_pickle_name(path: StrPath) -> None:
    if Path(path).suffix in PICKLE_SUFFIXES:
        raise AdapterFileError(f"{path}: {PICKLE}")


def _read_header(file: io.FileIO, limit: int) -> _Header:
    """Length, JSON and offsets, each checked before the next is used."""
    path, size = file.name, os.fstat(file.fileno()).st_size
    file.seek(0)
    start = read_exactly(file, min(size, 16))
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8 or start[8:9] != b"{":
        for signature, meaning in SIGNATURES.items():
            if start.startswith(signature):
                raise AdapterFileError(f"{path}: {meaning}")
        raise AdapterFileError(
            f"{path}: is no safetensors file, or not a whole one ({size} bytes, the first 8 "
            f"announce a header of {length}); copy it again"
        )
    if length > limit:
        raise AdapterFileError(
            f"{path}: has a header of {length} bytes, expected at most {limit}; "
            "an adapter needs less; where you trust the file, read it with safetensors"
        )
    file.seek(8)
    header = parse_json(read_exactly(file, length), f"{path}: its header")
    metadata = header.pop("__metadata__", {})
    _check_metadata(path, metadata)
    data_size = size - 8 - length
    entries = {key: _entry(path, key, fields, data_size) for key, fields in header.items()}
    _check_layout(path, entries, data_size)
    return _Header(entries, 8 + length, metadata)


def _check_metadata(path: str, metadata: Any) -> None:
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise AdapterFileError(
            f"{path}: '__metadata__': expected strings only; write the file again"
        )


def _entry(path: str, key: str, fields: Any, data_size: int) -> _Entry:
    """One tensor's description; its size fits its shape and the file."""
    where = f"{path}: {short(key)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(f"{where}: expected dtype, shape and data_offsets, and nothing else")
    name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        got = short(name) if isinstance(name, str) else type(name).__name__
        raise AdapterFileError(f"{where}: got dtype {got}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterFileError(
            f"{where}: its shape is no list of at most {MAX_DIMENSIONS} sizes; the file is damaged"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise AdapterFileError(
            f"{where}: its data_offsets are no range in the {data_size} bytes of data; "
            "the file is damaged"
        )
    dtype, (begin, end) = DTYPES[name], offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise AdapterFileError(
            f"{where}: {end - begin} bytes for shape {shape} in {name}, expected {needed}; "
            "the file is damaged"
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    # Not isinstance: True is an int.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: str, entries: Mapping[str, _Entry], data_size: int) -> None:
    """Tensor after tensor, without overlap or gap, up to the end of the file."""
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = "overlaps another tensor" if entry.begin < position else "follows a gap"
            raise AdapterFileError(f"{path}: {short(key)}: {problem}; the file is damaged")
        position = entry.end
    if position != data_size:
        raise AdapterFileError(
            f"{path}: {data_size - position} bytes after the last tensor; the file is damaged"
        )


def _compare(path: str, entries: Mapping[str, _Entry], expected: Mapping[str, TensorSpec]) -> None:
    unknown = [key for key in entries if key not in expected]
    missing = [key for key in expected if key not in entries]
    if unknown or missing:
        parts = [
            f"{what} key {short(keys[0])}" + (f" and {len(keys) - 1} more" if keys[1:] else "")
            for what, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        raise AdapterFileError(
            f"{path}: {', '.join(parts)}; the adapter was made for another model or with other "
            "target_modules than the config names"
        )
    for key, spec in expected.items():
        entry, where = entries[key], f"{path}: {short(key)}"
        if entry.shape != tuple(spec.shape):
            raise AdapterFileError(
                f"{where}: got shape {list(entry.shape)}, expected {list(spec.shape)}; "
                "check the base model and the config's r and rank_pattern"
            )
        if entry.dtype not in spec.dtypes:
            allowed = ", ".join(sorted(str(dtype) for dtype in spec.dtypes))
            raise AdapterFileError(
                f"{where}: got dtype {entry.dtype}, expected {allowed}; convert the file"
            )


def _read_tensor(file: io.FileIO, header: _Header, key: str, spec: TensorSpec) -> Tensor:
    tensor = _read_data(file, header, header.entries[key])
    if not _is_finite(tensor):
        raise AdapterFileError(
            f"{file.name}: {short(key)} has NaN or Inf; its training went wrong, "
            "or the file is damaged"
        )
    narrower = spec.held_in is not None and _largest(spec.held_in) < _largest(tensor.dtype)
    if narrower and not _is_finite(tensor, spec.held_in):
        raise AdapterFileError(
            f"{file.name}: {short(key)} has values that are too large for {spec.held_in}, in which "
            "the model holds them; load with autocast_adapter_dtype=True, or into a wider model"
        )
    return tensor


def _read_data(file: io.FileIO, header: _Header, entry: _Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")  # not the default device
    file.seek(header.data_start + entry.begin)
    read_into(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0


def _is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether it is, or would be in another dtype; without temporaries of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    for part in torch.split(tensor.reshape(-1), 1 << 20):
        part = part.float() if part.itemsize == 1 else part  # torch computes little in 8 bits
        ends = torch.stack(torch.aminmax(part))  # both NaN if there is one
        if not bool(torch.isfinite(ends.to(dtype or ends.dtype)).all()):
            return False
    return True
