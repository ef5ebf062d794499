"""Block-diagonal lora_A or lora_B (BD-LoRA), of which only the blocks are parameters: a server that
divides the layer between GPUs then has no sums to exchange between them."""

from __future__ import annotations

import torch
from torch import Tensor


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """The matrix [rows, count * columns] of blocks that lie one below the other in [rows, columns].

    Differentiable; zero beside the blocks.
    """
    return torch.block_diag(*blocks.chunk(count, 0))  # type: ignore[no-untyped-call,no-any-return]


def check_blocks(where: str, count: int, in_features: int, out_features: int) -> None:
    """ValueError for a matrix [out_features, in_features] that has no such number of blocks."""
    if in_features % count or out_features % count:
        raise ValueError(
            f"{where}: nblocks: got {count}, expected a divisor of in_features={in_features} and "
            f"out_features={out_features}; they are not divisible by it"
        )
