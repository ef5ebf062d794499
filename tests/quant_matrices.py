"""Quantized matrices of every packing and of all that a description can have, without a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ext.quant import NestedScales, QuantizedWeight, quantize
from lora_ext.quant.packing import PACKINGS

BF16, FP16 = torch.bfloat16, torch.float16


def random_matrix(
    N: int,
    K: int,
    packing: str,
    block_size: int,
    *,
    scales: str = "plain",
    shift: str | None = None,
    zero_point: bool = False,
    factor: float | None = None,
    rounding: torch.dtype = torch.float32,
    numbers: torch.dtype = torch.float32,
    seed: int = 0,
) -> QuantizedWeight:
    """Random codes; `scales` and `shift` are "plain", "nested" or "nested without offset"."""
    generator = torch.Generator().manual_seed(seed)
    kind = PACKINGS[packing]
    blocks = -(-N * K // block_size)

    def integers(size: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator).to(dtype)

    def per_block(how: str, size: float) -> Tensor | NestedScales:
        if how == "plain":
            return (torch.randn(blocks, generator=generator) * size).to(numbers)
        codes = integers(blocks, 0, 256, torch.uint8)
        codebook = torch.randn(256, generator=generator)
        absmax = (torch.rand(-(-blocks // 5), generator=generator) * size).to(numbers)
        offset = None if how == "nested without offset" else 0.1 * size
        return NestedScales(codes, codebook, absmax, 5, offset)

    signed = kind.dtype is torch.int8
    limits = (-128, 128) if signed else (0, 256)
    size = 1 / 128 / K**0.5 if signed else 1 / K**0.5
    return QuantizedWeight(
        shape=(N, K),
        codes=integers(kind.nbytes(N * K), *limits, kind.dtype),
        packing=packing,
        scales=per_block(scales, size),
        block_size=block_size,
        dtype=torch.float32,
        codebook=None if signed else torch.randn(2**kind.bits, generator=generator),
        zero_point=integers(blocks, -8, 8, torch.int8) if zero_point else None,
        shift=None if shift is None else per_block(shift, 1 / K**0.5),
        factor=factor,
        rounding=rounding,
    )


def quantized(quant_type: str, **options: Any) -> Callable[[int, int], QuantizedWeight]:
    def make(N: int, K: int) -> QuantizedWeight:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) / K**0.5
        return quantize(weight, quant_type, **options)

    return make


def random(packing: str, block_size: int, **options: Any) -> Callable[[int, int], QuantizedWeight]:
    return lambda N, K: random_matrix(N, K, packing, block_size, **options)


# Those that any number of values can be packed by.
ANY_SIZE = {
    "nf4": quantized("nf4"),
    "nf4-nested": quantized("nf4", nested=True),
    "fp4-32": quantized("fp4", block_size=32),
    "nf4-4096": quantized("nf4", block_size=4096),
    "int8": quantized("int8"),
    "high_first-7": random("high_first", 7, numbers=BF16, rounding=BF16),
    "int8-32-fp16": random("int8", 32, numbers=FP16),
    "int8-all": random(
        "int8", 48, zero_point=True, shift="plain", factor=0.3, rounding=FP16, numbers=BF16
    ),
}
# N * K in units of 256
MATRICES = ANY_SIZE | {
    "low_first": random("low_first", 128, zero_point=True, numbers=BF16, rounding=BF16),
    "low_first-all": random(
        "low_first", 33, zero_point=True, shift="nested", scales="nested", factor=1.7
    ),
    "halves_16": random("halves_16", 32, shift="plain", numbers=FP16),
    "halves_32": random(
        "halves_32",
        32,
        scales="nested without offset",
        shift="nested without offset",
        numbers=FP16,
    ),
    "q6_k": random("q6_k", 16, scales="nested without offset", numbers=FP16),
    "q6_k-all": random("q6_k", 50, zero_point=True, shift="plain", factor=-0.5, rounding=BF16),
}


def values(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Those that operators multiply."""
    if dtype is torch.float64:
        return weight.dequantize(torch.float32).double()
    return weight.dequantize(dtype)
