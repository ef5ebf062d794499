"""Mixing of task vectors: weighted sums of tensors that are first thinned out, or that first agree
on a sign. TIES is arXiv:2306.01708, DARE arXiv:2311.03099."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIXING = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGN_METHODS = ("total", "frequency")


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The `int(density * numel)` elements of the largest magnitude, zero elsewhere."""
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view_as(tensor)


def drop_and_rescale(
    tensor: Tensor, density: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each element kept with probability `density` and divided by it, else zero."""
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def majority_sign_mask(tensors: Tensor, method: str) -> Tensor:
    """Where an element of tensors [n, ...] has the sign of the n: that of their sum ("total") or of
    most of them ("frequency"), plus where undecided."""
    votes = tensors if method == "total" else tensors.sign()
    majority = torch.where(votes.sum(0) >= 0, 1, -1)
    return tensors.sign() == majority


def mix(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The weighted sum of tensors of one shape, after what `method` does first.

    "magnitude_prune" and "ties" keep the largest elements, "dare_linear" and "dare_ties" random
    ones; the two "ties" then elect a sign for each element, regardless of the weights, and sum
    only what has that sign, divided by how many have it.

    Args:
        tensors: n tensors of one shape, dtype and device.
        weights: n factors.
        method: one of MIXING.
        density: share of elements to keep; needed for all but "linear".
        majority_sign_method: "total" or "frequency".
        generator: for the two "dare"; torch's default one if None.

    Returns:
        A tensor of that shape.
    """
    if method != "linear" and density is not None and density < 1.0:
        if method.startswith("dare"):
            tensors = [drop_and_rescale(tensor, density, generator) for tensor in tensors]
        else:
            tensors = [keep_largest(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * factors.view(-1, *[1] * (stacked.dim() - 1))
    if not method.endswith("ties"):
        return weighted.sum(0)
    mask = majority_sign_mask(stacked, majority_sign_method)
    return (weighted * mask).sum(0) / mask.sum(0).clamp(min=1)
