"""GGUF's blocks: Q8_0, Q4_0, Q4_1, Q4_K and Q6_K, from their bytes. numpy and torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_ext.quant.checks import check_shape, fail
from lora_ext.quant.codebooks import integers, twos_complement
from lora_ext.quant.weight import NestedScales, QuantizedWeight

# The numbers of the types in files, for those who read one themselves.
NUMBERS = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 12: "Q4_K", 14: "Q6_K"}


class _Kind(NamedTuple):
    values: int  # of a block
    nbytes: int  # of a block
    fields: Callable[[np.ndarray], dict[str, Any]]


def read_gguf(data: Any, shape: Any, quant_type: Any, name: str = "weight") -> QuantizedWeight:
    """A matrix of a GGUF file.

    Args:
        data: its bytes, as uint8: a numpy array (a memory map, too) or a tensor on the CPU.
        shape: (N, K), as torch has it; files have it the other way round.
        quant_type: "Q8_0", "Q4_0", "Q4_1", "Q4_K" or "Q6_K", its number in files, or gguf's
            `GGMLQuantizationType`.
        name: of the tensor, for messages.

    Raises:
        ValueError: another type, or another number of bytes.
    """
    N, K = check_shape(name, shape)
    found = getattr(quant_type, "name", quant_type)
    found = NUMBERS.get(found, found) if isinstance(found, int) else found
    if not isinstance(found, str) or found not in _KINDS:
        fail(name, "quant_type", found, f"one of {list(_KINDS)}")
    kind = _KINDS[found]
    if K % kind.values:
        fail(name, "shape", (N, K), f"K in blocks of {kind.values}, as {found} has them")
    if isinstance(data, Tensor):
        if data.device.type != "cpu" or data.dtype is not torch.uint8:
            fail(name, "data", f"{data.dtype} on {data.device}", "a uint8 tensor on the CPU")
        data = data.detach().numpy()
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        fail(name, "data", getattr(data, "dtype", data), "a uint8 array or tensor")
    nbytes = N * K // kind.values * kind.nbytes
    if data.size != nbytes:
        fail(name, "data", f"{data.size} bytes", f"{nbytes} ({N} * {K} values of {found})")
    fields = kind.fields(data.reshape(-1, kind.nbytes))
    return QuantizedWeight(shape=(N, K), dtype=torch.float32, name=name, **fields)


def _bytes(part: np.ndarray) -> Tensor:
    """Of columns of the blocks, a copy: the file's blocks mix codes and scales."""
    return torch.from_numpy(part.copy().reshape(-1))


def _halves(part: np.ndarray) -> Tensor:
    """Two bytes of each block, as fp16."""
    return _bytes(part).view(torch.float16)


def _q8_0(blocks: np.ndarray) -> dict[str, Any]:
    return {
        "codes": _bytes(blocks[:, 2:]).view(torch.int8),
        "packing": "int8",
        "scales": _halves(blocks[:, :2]),
        "block_size": 32,
    }


def _q4_0(blocks: np.ndarray) -> dict[str, Any]:
    return {
        "codes": _bytes(blocks[:, 2:]),
        "packing": "halves_16",
        "scales": _halves(blocks[:, :2]),
        "block_size": 32,
        "codebook": integers(-8, 8, 4),
    }


def _q4_1(blocks: np.ndarray) -> dict[str, Any]:
    return {
        "codes": _bytes(blocks[:, 4:]),
        "packing": "halves_16",
        "scales": _halves(blocks[:, :2]),
        "shift": _halves(blocks[:, 2:4]),
        "block_size": 32,
        "codebook": integers(0, 16, 4),
    }


def _q4_k(blocks: np.ndarray) -> dict[str, Any]:
    """d, dmin, eight scales and eight minima of 6 bits in 12 bytes, 256 codes.

    Of the first four scales and minima the six bits are the low ones of bytes 0 to 3 and 4 to 7; of
    the last four, four bits are nibbles of bytes 8 to 11 and two are the high ones of the former.
    """
    first, second, third = (blocks[:, i : i + 4] for i in (4, 8, 12))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    table = torch.arange(256.0)
    return {
        "codes": _bytes(blocks[:, 16:]),
        "packing": "halves_32",
        "scales": NestedScales(_bytes(scales), table, _halves(blocks[:, :2]), 8),
        "shift": NestedScales(_bytes(minima), -table, _halves(blocks[:, 2:4]), 8),
        "block_size": 32,
        "codebook": integers(0, 16, 4),
    }


def _q6_k(blocks: np.ndarray) -> dict[str, Any]:
    """256 codes in 192 bytes, sixteen int8 scales, d."""
    scales = _bytes(blocks[:, 192:208])
    return {
        "codes": _bytes(blocks[:, :192]),
        "packing": "q6_k",
        "scales": NestedScales(scales, twos_complement(8), _halves(blocks[:, 208:]), 16),
        "block_size": 16,
        "codebook": integers(-32, 32, 6),
    }


_KINDS = {
    "Q8_0": _Kind(32, 34, _q8_0),
    "Q4_0": _Kind(32, 18, _q4_0),
    "Q4_1": _Kind(32, 20, _q4_1),
    "Q4_K": _Kind(256, 144, _q4_k),
    "Q6_K": _Kind(256, 210, _q6_k),
}
