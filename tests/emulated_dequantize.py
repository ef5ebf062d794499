"""The CUDA kernel that dequantizes, on CPU tensors, in the library of `emulated_rows`; and matrices
that reach each part of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from emulated import Guarded
from emulated_rows import INT, NAMES, POINTER, RowKernels
from quant_matrices import ANY_SIZE, MATRICES
from quant_problems import same_bits
from torch import Tensor

from lora_ext.quant import NestedScales, QuantizedWeight
from lora_ext.quant.operator import PACKING_INDEX, ROUNDING_INDEX

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Blocks(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("values", "codes", "codebook")),
        ("block_size", INT),
        *((name, ctypes.c_int) for name in ("type", "has_offset")),
        ("offset", ctypes.c_float),
    )


class _Dequantize(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("N", "K", "block_size")),
        *((name, ctypes.c_int) for name in ("packing", "rounding")),
        ("factor", ctypes.c_float),
        *((name, POINTER) for name in ("codes", "codebook", "zero_point", "values")),
        ("scales", _Blocks),
        ("shift", _Blocks),
    )


def dequantize(
    kernels: RowKernels, weight: QuantizedWeight, dtype: torch.dtype, offset: int = 0
) -> Tensor:
    """The matrix; its codes begin `offset` bytes after a multiple of 4."""
    guards: dict[str, Guarded] = {}
    kept: list[Tensor] = []

    def guarded(name: str, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype is torch.int8:
            tensor = tensor.view(torch.uint8)
        if name == "codes":  # as they lie, from there on
            tensor = torch.cat([tensor.new_zeros(offset), tensor])[offset:]
        if not kernels.guarded:
            kept.append(tensor)
            return tensor.data_ptr()
        guards[name] = Guarded(tensor, as_it_lies=name == "codes")
        return guards[name].tensor.data_ptr()

    def blocks(name: str, numbers: Tensor | NestedScales | None) -> _Blocks:
        if numbers is None:
            return _Blocks()
        if isinstance(numbers, Tensor):
            return _Blocks(values=guarded(name, numbers), type=ROUNDING_INDEX[numbers.dtype])
        return _Blocks(
            guarded(name, numbers.absmax),
            guarded(f"{name}.codes", numbers.codes),
            guarded(f"{name}.codebook", numbers.codebook),
            numbers.block_size,
            ROUNDING_INDEX[numbers.absmax.dtype],
            numbers.offset is not None,
            numbers.offset or 0.0,
        )

    values = torch.full(weight.shape, torch.nan, dtype=dtype)
    arguments = _Dequantize(
        *weight.shape,
        weight.block_size,
        PACKING_INDEX[weight.packing],
        ROUNDING_INDEX[weight.rounding],
        1.0 if weight.factor is None else weight.factor,
        guarded("codes", weight.codes),
        guarded("codebook", weight.codebook),
        guarded("zero_point", weight.zero_point),
        guarded("values", values),
        blocks("scales", weight.scales),
        blocks("shift", weight.shift),
    )
    kernels.check("dequantize", NAMES[dtype], arguments)
    for name, guard in guards.items():
        guard.check(name)
    return guards["values"].tensor if kernels.guarded else values


# Several blocks of threads; a last thread, and a last byte, that are used in part; one value.
SIZES = ((37, 264), (7, 293), (1, 1), (3, 2), (1, 1001))
UNITS = ((16, 16), (96, 40), (1, 256))  # of 256 codes


def check_dequantize(
    kernels: RowKernels, sizes: int = len(SIZES), dtypes: Iterable[torch.dtype] = DTYPES
) -> None:
    """Matrices of every packing, of the last `sizes` sizes, to the bit."""
    for number, (name, make) in enumerate(MATRICES.items()):
        for N, K in (SIZES if name in ANY_SIZE else UNITS)[-sizes:]:
            weight = make(N, K)
            for dtype in dtypes:
                got = dequantize(kernels, weight, dtype, offset=(number + N) % 4)
                assert same_bits(got, weight.dequantize(dtype)), f"{name}, {N} x {K}, {dtype}"
