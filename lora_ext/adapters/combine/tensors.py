"""Combining adapters into a new one: the mathematics of add_weighted_adapter, on tensors.

`plan_combination` checks a request once, `combine` then carries it out layer by layer. Names and
semantics are PEFT's; the result is right also where PEFT's is not: with rsLoRA, for grouped
convolutions, with lora_bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext.adapters.combine.mixing import MIXING, mix
from lora_ext.adapters.combine.request import Combination, wrong_argument


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter: the layer adds `scaling * (B A x + lora_bias)`.

    lora_A: [r, K]; of a convolution [r, in, *kernel]; of an embedding [r, num_embeddings].
    lora_B: [N, r]; of a convolution [N, r / groups, *ones]; of an embedding [embedding_dim, r].
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_bias: Tensor | None = None  # [N]


@torch.no_grad()
def combine(
    combination: Combination,
    layer: Mapping[str, Adapter],
    scaling: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Adapter:
    """One layer's part of the new adapter. The inputs are not changed.

    Args:
        combination: from `plan_combination`.
        layer: the adapters of this layer; names of `combination` that are not here count as zero.
        scaling: the new adapter's: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA. It is
            divided out, so that the layer adds the same whatever it is.
        generator: for the types with "dare", on the adapters' device; torch's default if None.

    Returns:
        New tensors of rank `combination.rank` and of the adapters' dtype, computed in float32
        (float64 for float64); a smaller rank, also with svd where min(N, K) is smaller, is filled
        up with zeros. lora_bias is there if one of the adapters has one.

    Raises:
        ValueError: no adapter of this layer takes part, their shapes do not go together, a rank is
            not a multiple of the convolution's groups, or one holds NaN or Inf.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise wrong_argument("scaling", scaling, "a finite number above 0")
    taking_part = [
        (name, weight)
        for name, weight in zip(combination.adapters, combination.weights, strict=True)
        if name in layer
    ]
    if not taking_part:
        raise wrong_argument(
            "adapters", f"{list(combination.adapters)}, none in this layer", "at least one of them"
        )
    groups = _check_layer(combination, {name: layer[name] for name, _ in taking_part})
    members, weights = [layer[name] for name, _ in taking_part], [w for _, w in taking_part]
    first = members[0]
    compute = torch.promote_types(first.lora_A.dtype, torch.float32)
    factors = [_by_group(member, groups, compute) for member in members]
    # What each product B A counts for in the new one.
    coefficients = [
        w * member.scaling / scaling for w, member in zip(weights, members, strict=True)
    ]
    if combination.combination_type == "cat":
        A, B = _concatenate(factors, coefficients)
    elif combination.combination_type in MIXING:
        A, B = _mix_factors(combination, factors, coefficients, generator)
    else:
        scaled = [(A * m.scaling, B) for (A, B), m in zip(factors, members, strict=True)]
        A, B = _mix_products(combination, scaled, weights, generator)
        B = B / scaling
    A, B = _fill_up(A, B, combination.rank // groups)
    return Adapter(
        A.reshape(-1, *first.lora_A.shape[1:]).to(first.lora_A.dtype),
        B.reshape(len(first.lora_B), -1, *first.lora_B.shape[2:]).to(first.lora_B.dtype),
        scaling,
        _mix_biases(combination, members, weights, scaling, generator),
    )


@torch.no_grad()
def subtract_mutated_init(trained: Adapter, initial: Adapter) -> Adapter:
    """The adapter of rank 2r that does to the original weight what `trained` does to the residual
    that a mutating initialisation left: B A - B0 A0, exactly.

    `scaling` stays; with twice the rank that takes lora_alpha times `alpha_factor`.

    Args:
        trained: the adapter, see `Adapter` for shapes.
        initial: what it was right after its initialisation.

    Raises:
        ValueError: different shapes or scalings.
    """
    for name in ("lora_A", "lora_B"):
        now, then = getattr(trained, name).shape, getattr(initial, name).shape
        if now != then:
            raise ValueError(
                f"subtract_mutated_init: {name}: got shape {tuple(then)} initially, expected "
                f"{tuple(now)} as now"
            )
    if trained.scaling != initial.scaling:
        raise ValueError(
            f"subtract_mutated_init: scaling: got {initial.scaling} initially, expected "
            f"{trained.scaling} as now"
        )
    groups = _groups(trained)
    dtype = trained.lora_A.dtype
    factors = [_by_group(trained, groups, dtype), _by_group(initial, groups, dtype)]
    A, B = _concatenate([factors[0], (factors[1][0], -factors[1][1])], [1.0, 1.0])
    return Adapter(
        A.reshape(-1, *trained.lora_A.shape[1:]),
        B.reshape(len(trained.lora_B), -1, *trained.lora_B.shape[2:]),
        trained.scaling,
        trained.lora_bias,
    )


def alpha_factor(use_rslora: bool) -> float:
    """By what lora_alpha (also in alpha_pattern) grows with twice the rank at the same scaling."""
    return math.sqrt(2.0) if use_rslora else 2.0


def _groups(adapter: Adapter) -> int:
    """Of the convolution it belongs to; else 1."""
    return max(len(adapter.lora_A) // max(adapter.lora_B.shape[1], 1), 1)


def _check_layer(combination: Combination, layer: Mapping[str, Adapter]) -> int:
    """The layer's groups, if its adapters go together."""
    first = next(iter(layer.values()))
    groups = _groups(first)
    expected = first.lora_A.shape[1:], first.lora_B.shape[:1] + first.lora_B.shape[2:]
    for name, adapter in layer.items():
        A, B = adapter.lora_A.shape, adapter.lora_B.shape
        if (A[1:], B[:1] + B[2:]) != expected or A[0] != groups * B[1]:
            raise wrong_argument(
                "adapters",
                f"lora_A, lora_B of shapes {tuple(A)}, {tuple(B)} for {name!r} beside "
                f"{tuple(first.lora_A.shape)}, {tuple(first.lora_B.shape)}",
                "shapes that differ in the rank only",
            )
        if combination.combination_type in MIXING and A[0] != len(first.lora_A):
            raise wrong_argument(
                "adapters",
                f"ranks {[len(adapter.lora_A) for adapter in layer.values()]} in one layer",
                f"equal ranks for combination_type={combination.combination_type!r}",
            )
        for tensor in (adapter.lora_A, adapter.lora_B, adapter.lora_bias):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise wrong_argument("adapters", f"NaN or Inf in {name!r}", "finite values")
    if combination.rank % groups:
        raise wrong_argument(
            "svd_rank", combination.rank, f"a multiple of the convolution's {groups} groups"
        )
    return groups


def _by_group(adapter: Adapter, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [groups, r / groups, K] and B [groups, N / groups, r / groups]: each group of a
    convolution's output channels sees its own part of the rank."""
    A, B = adapter.lora_A.to(dtype), adapter.lora_B.to(dtype)
    r, N = len(A), len(B)
    return A.reshape(groups, r // groups, -1), B.reshape(groups, N // groups, r // groups)


def _concatenate(
    factors: list[tuple[Tensor, Tensor]], coefficients: list[float]
) -> tuple[Tensor, Tensor]:
    A = torch.cat([A * c for (A, _), c in zip(factors, coefficients, strict=True)], dim=1)
    return A, torch.cat([B for _, B in factors], dim=2)


def _mix(
    combination: Combination,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    generator: torch.Generator | None,
) -> Tensor:
    method = combination.combination_type.removesuffix("_svd")
    return mix(
        tensors,
        weights,
        method if method in MIXING else "linear",
        density=combination.density,
        majority_sign_method=combination.majority_sign_method,
        generator=generator,
    )


def _mix_factors(
    combination: Combination,
    factors: list[tuple[Tensor, Tensor]],
    coefficients: list[float],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    # A negative sign goes to one side only, or the two would cancel.
    roots = [math.sqrt(abs(c)) for c in coefficients]
    signed = [math.copysign(root, c) for root, c in zip(roots, coefficients, strict=True)]
    A = _mix(combination, [A for A, _ in factors], signed, generator)
    return A, _mix(combination, [B for _, B in factors], roots, generator)


def _mix_products(
    combination: Combination,
    factors: list[tuple[Tensor, Tensor]],
    weights: list[float],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The factors that the SVD of the mixed products is cut down to."""
    driver = combination.svd_driver
    # The clamp depends on the vectors' signs, so it takes the SVD that PEFT takes.
    if combination.combination_type == "svd" and combination.svd_clamp is None:
        U, S, Vh = _low_rank_svd(*_concatenate(factors, weights), driver)
    else:
        delta = _mix(combination, [B @ A for A, B in factors], weights, generator)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    rank = combination.rank // len(U)
    A, B = Vh[:, :rank], U[:, :, :rank] * S[:, None, :rank]
    if combination.svd_clamp is not None:
        limit = _quantile(torch.cat([B.flatten(), A.flatten()]), combination.svd_clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return A, B


def _low_rank_svd(A: Tensor, B: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B A, [.., N, R] by [.., R, K], from QR factors of both: for a small R far cheaper
    than that of a matrix [N, K]."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False, driver=driver)
    return Q_B @ U, S, Vh @ Q_A.mT


def _quantile(values: Tensor, q: float) -> float:
    """As torch.quantile, which refuses more than 2^24 elements; not below 0."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)].item(), ordered[math.ceil(place)].item()
    return max(low + (high - low) * (place - math.floor(place)), 0.0)


def _fill_up(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to `rank` rows of A [groups, r, K] and columns of B [groups, N, r]."""
    missing = rank - A.shape[1]
    if missing < 0:
        raise wrong_argument(
            "ranks", f"at most {rank} per group", f"{A.shape[1]}, the rank in a layer"
        )
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))


def _mix_biases(
    combination: Combination,
    members: list[Adapter],
    weights: list[float],
    scaling: float,
    generator: torch.Generator | None,
) -> Tensor | None:
    """The biases are mixed as the products are: what a layer adds is linear in both."""
    present = [member.lora_bias for member in members if member.lora_bias is not None]
    if not present:
        return None
    compute = torch.promote_types(present[0].dtype, torch.float32)
    zero = torch.zeros_like(present[0], dtype=compute)
    biases = [
        zero if member.lora_bias is None else member.lora_bias.to(compute) * member.scaling
        for member in members
    ]
    return (_mix(combination, biases, weights, generator) / scaling).to(present[0].dtype)
