"""How codes lie in bytes. A unit is the least number of bytes that holds whole codes; units follow
each other in the order of the matrix, row by row, so that any rows can be read alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """One layout.

    Attributes:
        bits: of a code.
        unit: codes in a unit.
        unit_bytes: bytes of a unit.
        unpack: bytes of whole units [units * unit_bytes] to codes [units * unit].
        padded: the last unit may be used in part; else the matrix fills whole units.
        dtype: of the bytes.
    """

    bits: int
    unit: int
    unit_bytes: int
    unpack: Callable[[Tensor], Tensor]
    padded: bool = False
    dtype: torch.dtype = torch.uint8

    def nbytes(self, numel: int) -> int:
        """Bytes of a matrix of so many values."""
        return -(-numel // self.unit) * self.unit_bytes

    def codes(self, data: Tensor, first: int, last: int) -> Tensor:
        """The codes first <= i < last of a matrix."""
        begin, end = first // self.unit, -(-last // self.unit)
        units = data[begin * self.unit_bytes : end * self.unit_bytes]
        start = first - begin * self.unit
        return self.unpack(units)[start : start + last - first]

    def looked_up(self, data: Tensor, codebook: Tensor, first: int, last: int) -> Tensor:
        """The fp32 numbers of these codes in a table; two neighbours in a byte are one look-up."""
        if self.unit != 2 or first % 2:
            return codebook.index_select(0, self.codes(data, first, last).int())
        every = torch.arange(256, dtype=torch.uint8, device=data.device)
        pairs = codebook[self.unpack(every).int()].view(torch.int64)  # two numbers as one
        units = data[first // 2 : -(-last // 2)]
        return pairs.index_select(0, units.int()).view(torch.float32)[: last - first]


def _bytes(data: Tensor) -> Tensor:
    return data


def _high_first(data: Tensor) -> Tensor:
    return torch.stack([data >> 4, data & 15], dim=1).view(-1)


def _low_first(data: Tensor) -> Tensor:
    return torch.stack([data & 15, data >> 4], dim=1).view(-1)


def _halves(size: int) -> Callable[[Tensor], Tensor]:
    """The low nibbles of `size` bytes, then their high nibbles."""

    def unpack(data: Tensor) -> Tensor:
        units = data.view(-1, 1, size)
        return torch.cat([units & 15, units >> 4], dim=1).view(-1)

    return unpack


def _q6_k(data: Tensor) -> Tensor:
    """Of each 256 codes the low four bits in 128 bytes, then the high two in 64.

    Both are halved: 128 codes take the low nibbles of 64 bytes, then the high nibbles, and the four
    pairs of bits of 32 bytes, lowest pair first.
    """
    units = data.view(-1, 192)
    low = units[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 2, 4, 32)
    high = units[:, 128:].reshape(-1, 2, 1, 32)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2)
    return (low | (high << 4)).view(-1)


PACKINGS = {
    "int8": Packing(8, 1, 1, _bytes, dtype=torch.int8),
    "high_first": Packing(4, 2, 1, _high_first, padded=True),  # bitsandbytes, NF4Tensor
    "low_first": Packing(4, 2, 1, _low_first),  # Int4Tensor
    "halves_16": Packing(4, 32, 16, _halves(16)),  # Q4_0, Q4_1
    "halves_32": Packing(4, 64, 32, _halves(32)),  # Q4_K
    "q6_k": Packing(6, 256, 192, _q6_k),
}
