"""Attention between projected queries, keys and values, with the masks of nn.MultiheadAttention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Masks(NamedTuple):
    """What keeps queries from keys: True, or what is added to the scores."""

    attn_mask: Tensor | None  # [L, S] or [N * heads, L, S]
    key_padding_mask: Tensor | None  # [N, S]
    is_causal: bool  # attn_mask is the causal one

    def check(self, N: int, heads: int, L: int, S: int) -> None:
        """ValueError or TypeError unless the masks are for these sizes."""
        shapes: dict[str, list[tuple[int, ...]]] = {
            "attn_mask": [(L, S), (N * heads, L, S)],
            "key_padding_mask": [(N, S)],
        }
        for name, expected in shapes.items():
            mask: Tensor | None = getattr(self, name)
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"attention: {name}: got {mask.dtype}, expected bool or floating")
            if tuple(mask.shape) not in expected:
                sizes = " or ".join(map(str, expected))
                raise ValueError(
                    f"attention: {name}: got shape {tuple(mask.shape)}, expected {sizes}"
                )

    def additive(self, N: int, S: int, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one to add to scores [N, heads, L, S]; keys that were appended are seen."""
        total: Tensor | None = None
        if self.attn_mask is not None:
            mask = _additive(self.attn_mask, S, dtype)
            total = mask if mask.dim() == 2 else torch.unflatten(mask, 0, (N, -1))
        if self.key_padding_mask is not None:
            mask = _additive(self.key_padding_mask, S, dtype)[:, None, None, :]
            total = mask if total is None else total + mask
        return total


def _additive(mask: Tensor, S: int, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return nn.functional.pad(mask.to(dtype), (0, S - mask.shape[-1]))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    masks: Masks,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(q k^T / sqrt(E / heads) + mask) v` in each head.

    Args:
        q: [N, L, E]. k, v: [N, S, E], of which the masks may know only the first.
        dropout_p: of the weights.

    Returns:
        [N, L, heads, E / heads], and with need_weights the weights, [N, heads, L, S].
    """
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    N, S = k.shape[0], k.shape[2]
    if not need_weights:
        # The hint stands for a mask of its own, and only for one without appended keys.
        hint = masks.attn_mask if masks.is_causal and masks.key_padding_mask is None else None
        causal = hint is not None and hint.shape[-1] == S
        mask = None if causal else masks.additive(N, S, q.dtype)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
        return y.transpose(1, 2), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mask = masks.additive(N, S, scores.dtype)
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout_p)
    return (weights @ v).transpose(1, 2), weights
