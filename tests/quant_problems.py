"""Random quantized matrices, and what a library's bits are compared by."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, signs of zeros and NaNs too."""
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    as_integers = INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(as_integers), other.contiguous().view(as_integers))


def random_weight(draw: random.Random, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, some of zeros, one value that is large."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    weight = torch.randn(N, K, generator=generator)
    weight *= torch.rand(N, 1, generator=generator) * 0.2
    if N > 2:
        weight[draw.randrange(N)] = 0
    weight[draw.randrange(N), draw.randrange(K)] = 3
    return weight.to(dtype)


def row_ranges(draw: random.Random, N: int) -> Iterator[tuple[int, int]]:
    """The first row, the last, and some between."""
    yield from ((0, 1), (N - 1, N))
    begin = draw.randrange(N)
    yield begin, draw.randint(begin, N)
