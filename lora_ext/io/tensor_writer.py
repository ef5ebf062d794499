"""Safetensors files written tensor by tensor: of what is too large to be held in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.io.adapter_file import DTYPES, TensorSpec
from lora_ext.io.files import naming

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = {"format": "pt"}  # as transformers wants it


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    values: Callable[[str], Iterable[Tensor]],
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes a file whose tensors lie one after another in the order of `specs`.

    Args:
        specs: shape and dtype by key.
        values: a tensor's elements, in parts of any size, which are let go one by one.
        advance: is told how many bytes were written since the last call.

    Raises:
        ValueError: the parts of a tensor are not what its spec says.
    """
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for key, spec in specs.items():
        begin, end = end, end + _nbytes(spec)
        header[key] = {
            "dtype": _NAMES[_dtype(spec)],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data that begins at a multiple of 8 can be mapped
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, spec in specs.items():
            written = 0
            for part in values(key):
                if part.dtype != _dtype(spec):
                    raise ValueError(f"{key}: got {part.dtype}, expected {_dtype(spec)}")
                data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                written += len(data)
                advance(len(data))
                del part, data  # before the next one is made
            if written != _nbytes(spec):
                raise ValueError(f"{key}: got {written} bytes, expected {_nbytes(spec)}")


def _dtype(spec: TensorSpec) -> torch.dtype:
    (dtype,) = spec.dtypes
    return dtype


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _dtype(spec).itemsize
