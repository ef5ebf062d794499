"""One description of a quantized matrix, whichever library made it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext.quant.checks import (
    FLOATS,
    check_count,
    check_dtype,
    check_shape,
    check_tensor,
    fail,
    is_integer,
    version,
)
from lora_ext.quant.packing import PACKINGS

# Values that dequantize() has in fp32 at a time, beside the result.
PANEL = 1 << 20


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Numbers of blocks that are quantized themselves: number i is

        codebook[codes[i]] * absmax[i // block_size] + offset.

    Attributes:
        codes: [blocks], uint8.
        codebook: [256], fp32.
        absmax: [ceil(blocks / block_size)].
        block_size: codes that share an absmax.
        offset: added to each, if there is one.
    """

    codes: Tensor  # [blocks]
    codebook: Tensor  # [256]
    absmax: Tensor  # [ceil(blocks / block_size)]
    block_size: int
    offset: float | None = None

    def check(self, name: str, field: str, blocks: int, why: str) -> None:
        """A ValueError for numbers that are not those of so many blocks."""
        check_tensor(name, f"{field}.codes", self.codes, blocks, (torch.uint8,), why)
        check_tensor(name, f"{field}.codebook", self.codebook, 256, (torch.float32,))
        size = check_count(name, f"{field}.block_size", self.block_size)
        count = -(-blocks // size)
        why = f" ({blocks} codes in blocks of {size})"
        check_tensor(name, f"{field}.absmax", self.absmax, count, FLOATS, why)
        if self.offset is not None and not (
            isinstance(self.offset, float) and math.isfinite(self.offset)
        ):
            fail(name, f"{field}.offset", self.offset, "a finite float, or None")

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        return self.codes, self.codebook, self.absmax

    def values(self, begin: int, end: int) -> Tensor:
        """fp32 numbers of blocks begin <= i < end, with a rounding after each operation."""
        found = self.codebook.index_select(0, self.codes[begin:end].int())
        size = self.block_size
        if begin % size == end % size == 0:
            found = found.view(-1, size)
        found *= _per_block(self.absmax, begin, end, size)
        found = found.view(-1)
        return found if self.offset is None else found + self.offset


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A matrix [N, K], row by row in blocks of `block_size` values, in which value i is

        (codebook[code] - zero_point[b]) * scales[b] * factor + shift[b],  b = i // block_size,

    computed in fp32 with a rounding after each operation, as the libraries do, and rounded to
    `rounding`, then to the dtype asked for. The tensors are the source's own bytes wherever its
    layout allows that, not copies: who changes them changes the matrix.

    Attributes:
        shape: (N, K).
        codes: the packed codes, flat.
        packing: how they lie in their bytes, a key of `PACKINGS`.
        scales: one for each block.
        block_size: values that share a scale; a block may cross rows.
        dtype: of `dequantize()`.
        codebook: [2**bits], fp32; without one, codes of 8 bits are the numbers themselves.
        zero_point: int8 for each block, or None for 0.
        shift: for each block, or None for 0.
        factor: or None for 1.
        rounding: the dtype that the source library computes values in.
        name: of the tensor, in messages.
        whole: the tensor subclass that these are parts of: what is copied into it counts for it
            alone.

    Raises:
        ValueError: a field does not fit the others. Names the tensor and the field.
    """

    shape: tuple[int, int]
    codes: Tensor  # [packed bytes]
    packing: str
    scales: Tensor | NestedScales  # [blocks]
    block_size: int
    dtype: torch.dtype
    codebook: Tensor | None = None  # [2**bits]
    zero_point: Tensor | None = None  # [blocks]
    shift: Tensor | NestedScales | None = None  # [blocks]
    factor: float | None = None
    rounding: torch.dtype = torch.float32
    name: str = "weight"
    whole: Tensor | None = None

    def __post_init__(self) -> None:
        name = self.name
        N, K = check_shape(name, self.shape)
        object.__setattr__(self, "shape", (N, K))
        packing = PACKINGS.get(self.packing)
        if packing is None:
            fail(name, "packing", self.packing, f"one of {list(PACKINGS)}")
        if N * K % packing.unit and not packing.padded:
            fail(name, "shape", self.shape, f"a multiple of {packing.unit} values")
        nbytes = packing.nbytes(N * K)
        why = f" ({N} * {K} values of {packing.bits} bits)"
        check_tensor(name, "codes", self.codes, nbytes, (packing.dtype,), why)
        if self.codebook is not None:
            check_tensor(name, "codebook", self.codebook, 2**packing.bits, (torch.float32,))
            if packing.dtype is not torch.uint8:
                fail(name, "codebook", self.codebook, "None beside signed codes")
        elif packing.bits != 8:
            fail(name, "codebook", None, f"a float32 tensor of shape [{2**packing.bits}]")
        size = check_count(name, "block_size", self.block_size)
        blocks = -(-N * K // size)
        why = f" ({N} * {K} values in blocks of {size})"
        for field in ("scales", "shift"):
            per_block = getattr(self, field)
            if isinstance(per_block, NestedScales):
                per_block.check(name, field, blocks, why)
            elif per_block is not None or field == "scales":
                check_tensor(name, field, per_block, blocks, FLOATS, why)
        if self.zero_point is not None:
            check_tensor(name, "zero_point", self.zero_point, blocks, (torch.int8,), why)
        if self.factor is not None and not (
            isinstance(self.factor, float) and math.isfinite(self.factor)
        ):
            fail(name, "factor", self.factor, "a finite float, or None")
        check_dtype(name, "dtype", self.dtype)
        check_dtype(name, "rounding", self.rounding)
        for field, tensor in self._tensors():
            if tensor.device != self.codes.device:
                fail(name, field, f"a tensor on {tensor.device}", f"one on {self.codes.device}")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in ("codes", "codebook", "scales", "zero_point", "shift"):
            value: Any = getattr(self, field)
            if isinstance(value, NestedScales):
                yield from ((field, tensor) for tensor in value.tensors())
            elif value is not None:
                yield field, value

    def __repr__(self) -> str:
        N, K = self.shape
        return (
            f"QuantizedWeight({self.name}: [{N}, {K}], {self.packing}, {self.bits} bits, blocks of "
            f"{self.block_size}, {self.dtype}, {self.nbytes} bytes on {self.device})"
        )

    def versions(self) -> tuple[int, ...]:
        """How often each of its tensors was changed in place."""
        tensors = [tensor for _, tensor in self._tensors()]
        return tuple(map(version, tensors if self.whole is None else [*tensors, self.whole]))

    def owner(self) -> None:
        """What has to live as long as it is used: it holds its tensors itself."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return PACKINGS[self.packing].bits

    @property
    def device(self) -> torch.device:
        """That of all tensors."""
        return self.codes.device

    @property
    def along(self) -> str:
        """ "row": each row is a block; "K": rows are whole blocks; "flat": blocks cross rows."""
        K = self.shape[1]
        return "row" if self.block_size == K else "flat" if K % self.block_size else "K"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K], in `self.dtype` or the dtype given: to the bit what the library that
        made it gives on the CPU."""
        dtype = self._result_dtype(dtype)
        N, K = self.shape
        rows = max(1, PANEL // K)
        if rows >= N:
            return self.dequantize_rows(0, N, dtype)
        result = torch.empty(N, K, dtype=dtype, device=self.device)
        for begin in range(0, N, rows):
            end = min(begin + rows, N)
            result[begin:end] = self.dequantize_rows(begin, end, dtype)
        return result

    def dequantize_rows(self, begin: int, end: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows begin <= n < end of `dequantize`, [end - begin, K], in memory of their size."""
        dtype = self._result_dtype(dtype)
        N, K = self.shape
        if not (is_integer(begin) and is_integer(end) and 0 <= begin <= end <= N):
            fail(self.name, "rows", f"{begin!r} to {end!r}", f"0 <= begin <= end <= {N}")
        if begin == end:
            return torch.empty(0, K, dtype=dtype, device=self.device)
        first, last = begin * K, end * K
        packing, size = PACKINGS[self.packing], self.block_size
        if self.codebook is None:
            values = packing.codes(self.codes, first, last).float()
        else:
            values = packing.looked_up(self.codes, self.codebook, first, last)
        if first % size == last % size == 0:  # whole blocks: their numbers need not be repeated
            values = values.view(-1, size)
        if self.zero_point is not None:
            values -= _per_block(self.zero_point, first, last, size)
        values *= _per_block(self.scales, first, last, size)
        if self.factor is not None:
            values *= self.factor
        if self.shift is not None:
            values += _per_block(self.shift, first, last, size)
        return values.to(self.rounding).to(dtype).view(end - begin, K)

    def _result_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is not None:
            check_dtype(self.name, "dtype", dtype)
        return self.dtype if dtype is None else dtype


def _per_block(per_block: Tensor | NestedScales, first: int, last: int, size: int) -> Tensor:
    """fp32 numbers of values first <= i < last, whose blocks may begin before and end after; of
    whole blocks [blocks, 1]."""
    begin, end = first // size, -(-last // size)
    if isinstance(per_block, NestedScales):
        numbers = per_block.values(begin, end)
    else:
        numbers = per_block[begin:end].float()
    if first % size == last % size == 0:
        return numbers.unsqueeze(1)
    counts = torch.full((end - begin,), size, device=numbers.device)
    counts[0] -= first - begin * size
    counts[-1] -= end * size - last
    return numbers.repeat_interleave(counts, output_size=last - first)
