"""What is measured: models by their sizes, and which of their layers have adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora_ext.bench.grid import DTYPES

ALL_LINEAR, Q_V = "all-linear", "q,v"
TARGETS = {"all-linear": ALL_LINEAR, "qv": Q_V}  # by what the command line calls them


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. The vocabulary is small: its product is nothing that adapters change,
    and would hide what they do in models of few layers."""

    family: str  # llama, bert
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tokens: int  # of a step, where no others are asked for
    vocabulary: int = 1024

    def resized(self, widths: tuple[int, int] | None, layers: int | None) -> Sizes:
        """Of other widths, with heads of 64 features and the same heads for each k and v."""
        sizes = self
        if widths:
            heads = max(widths[0] // _HEAD, 1)
            kv_heads = max(heads * self.kv_heads // self.heads, 1)
            sizes = replace(
                sizes, hidden=widths[0], intermediate=widths[1], heads=heads, kv_heads=kv_heads
            )
        return replace(sizes, layers=layers) if layers else sizes


_HEAD = 64
MODELS = {
    "tiny": Sizes("llama", 256, 704, layers=2, heads=4, kv_heads=2, tokens=512),
    "bert": Sizes("bert", 768, 3072, layers=12, heads=12, kv_heads=12, tokens=2048),
    # The widths of Llama-3.2-1B
    "llama-1b-shaped": Sizes("llama", 2048, 8192, layers=16, heads=32, kv_heads=8, tokens=2048),
}
_SEQUENCE = 512  # tokens, at most


@dataclass(frozen=True)
class ModelCase:
    """A step of one model."""

    model: str  # a key of MODELS
    sizes: Sizes
    targets: str
    tokens: int
    rank: int
    dtype: str  # of the base; a key of DTYPES
    dropout_p: float

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and the tokens of each."""
        length = next(n for n in range(min(_SEQUENCE, self.tokens), 0, -1) if self.tokens % n == 0)
        return self.tokens // length, length

    @property
    def what(self) -> str:
        sizes = self.sizes
        return f"{sizes.layers} x {sizes.hidden}→{sizes.intermediate}"

    def __str__(self) -> str:
        return (
            f"{self.model} {self.what} M={self.tokens} {self.targets} r={self.rank} {self.dtype} "
            f"p={self.dropout_p:g}"
        )


def model_cases(
    model: str,
    sizes: Sizes,
    targets: Sequence[str],
    tokens: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    dropouts: Sequence[float],
) -> Iterator[ModelCase]:
    for axes in itertools.product(targets, tokens, ranks, dtypes, dropouts):
        yield ModelCase(model, sizes, *axes)
