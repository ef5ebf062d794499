"""What is measured: cases, and the grids that they are taken from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FWD = "fwd"  # y, without a graph
FWD_BWD = "fwd+bwd"  # y with a graph, then dx, dA and dB
MODES = (FWD, FWD_BWD)


@dataclass(frozen=True)
class Case:
    """One LoRA linear problem."""

    in_features: int  # K
    out_features: int  # N
    tokens: int  # M
    rank: int  # r
    dtype: str  # of the base layer and of x; a key of DTYPES
    dropout_p: float

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        return f"{self.in_features}→{self.out_features}"

    def __str__(self) -> str:
        return f"{self.shape} M={self.tokens} r={self.rank} {self.dtype} p={self.dropout_p:g}"


@dataclass(frozen=True)
class Grid:
    """The values of each axis; the cases are their product."""

    shapes: tuple[tuple[int, int], ...]  # (K, N)
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    dropouts: tuple[float, ...] = (0.0, 0.1)

    def cases(self) -> list[Case]:
        axes = itertools.product(self.shapes, self.tokens, self.ranks, self.dtypes, self.dropouts)
        return [Case(K, N, M, r, dtype, p) for (K, N), M, r, dtype, p in axes]


# Shapes are rectangular as well as square, since K and N enter the cost of LoRA differently.
_CPU_SHAPES = ((768, 768), (1024, 4096), (4096, 4096))
_CPU_TOKENS = (1, 16, 512, 2048)
# The projections of Llama 8B: q and o, k and v, gate and up, down.
_CUDA_SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
_CUDA_TOKENS = (1, 16, 512, 8192)

QUICK = Grid(shapes=((256, 512),), tokens=(1, 64), ranks=(8,))

_DEFAULT = {
    "cpu": Grid(_CPU_SHAPES, _CPU_TOKENS, ranks=(16,)),
    "cuda": Grid(_CUDA_SHAPES, tokens=(8192,), ranks=(16, 64), dtypes=("bf16",)),
}
_FULL = {
    "cpu": Grid(_CPU_SHAPES, _CPU_TOKENS, ranks=(8, 16, 64, 128)),
    "cuda": Grid(_CUDA_SHAPES, _CUDA_TOKENS, ranks=(8, 16, 64, 128)),
}


def default_grid(device: torch.device) -> Grid:
    """A grid of some minutes with the sizes that matter on this kind of device."""
    return _DEFAULT[device.type]


def full_grid(device: torch.device) -> Grid:
    """Every size, at every rank."""
    return _FULL[device.type]
