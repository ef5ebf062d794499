"""The truth in plain PyTorch, for tests and benchmarks: readable, differentiable, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "dora_linear",
    "dropout",
    "lora_embedding",
    "lora_linear",
    "merged_weight",
]


def dropout(x: Tensor, dropout_p: float, mask: Tensor | None) -> Tensor:
    """x [..., K] where mask (bool [M, K], M rows of x) is True, scaled by 1/(1-p); else 0."""
    if mask is None:
        return x
    survivor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return x * mask.reshape(x.shape).to(x.dtype) * survivor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """What `lora_ext.lora_linear` computes, with the dropout mask given (see `dropout_mask`).

    Adapters of another dtype than x are used as PEFT uses them: the low-rank product in their
    dtype, its result in that of x.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    d = dropout(x.to(lora_A.dtype), dropout_p, mask)
    low_rank = d @ lora_A.t() @ lora_B.t()
    if lora_bias is not None:
        low_rank = low_rank + lora_bias
    return y + (low_rank * scaling).to(y.dtype)


def lora_embedding(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float = 1.0
) -> Tensor:
    """What `lora_ext.lora_embedding` computes."""
    y = torch.nn.functional.embedding(indices, weight)
    low_rank = torch.nn.functional.embedding(indices, lora_A.t()) @ lora_B.t()
    return y + (low_rank * scaling).to(y.dtype)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """weight [N, K] + scaling * lora_B @ lora_A, computed in float64, in the dtype of weight."""
    delta = lora_B.double() @ lora_A.double() * scaling
    return (weight.double() + delta).to(weight.dtype)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DoRA as PEFT defines it (see `lora_ext.nn.dora`), weight + scaling * B A in memory."""
    direction = weight + scaling * (lora_B @ lora_A).to(weight.dtype)
    factor = magnitude / torch.linalg.vector_norm(direction, dim=1).detach()
    if mask is None:
        y: Tensor = factor.to(x.dtype) * torch.nn.functional.linear(x, direction)
    else:
        d = dropout(x, dropout_p, mask)
        low_rank = d @ lora_A.t() @ lora_B.t() * scaling
        base = (factor - 1) * torch.nn.functional.linear(d, weight)
        y = torch.nn.functional.linear(x, weight) + base + factor * low_rank
    return y if bias is None else y + bias
