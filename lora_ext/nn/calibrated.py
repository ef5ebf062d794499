"""Initialisations that start from data: what a calibration pass leaves at a module for them, and
the factors that come of it. The pass itself is `lora_ext.calibration`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.arguments import describe

# Initialisations, and where PEFT's preprocessing leaves at a module what they need; EVA needs
# nothing there, for it fills adapters that exist.
LEFT_AT = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}
FROM_DATA = ("eva", *LEFT_AT)

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class CordaEigens:
    """Of CorDA: r singular triplets of a weight times its inputs' covariance, the right vectors
    times the inverse of that. PEFT's names; `S_WC` [r], `U_WC` [N, r], `V_WC` [K, r]."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def left_at(layer: nn.Module, kind: object) -> Any:
    """What a calibration left at a layer's base for this initialisation; None without."""
    if not isinstance(kind, str) or kind not in LEFT_AT:
        return None
    return vars(layer._modules.get("base_layer") or layer).get(LEFT_AT[kind])


def check_lora_ga(where: str, direction: Any, scale: Any, stable_gamma: Any) -> None:
    """ValueError, after `where`, for what no LoraGAConfig may say."""
    for name, value, known in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"{where}{name}: got {describe(value)}, expected one of {known}")
    number = isinstance(stable_gamma, int | float) and not isinstance(stable_gamma, bool)
    if not number or not 0 < stable_gamma < math.inf:
        raise ValueError(
            f"{where}stable_gamma: got {describe(stable_gamma)}, expected a number above 0"
        )


def corda_factors(eigens: Any, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter [r, K], [N, r] of what `preprocess_corda`, ours or PEFT's, left.

    Raises:
        ValueError: there is nothing, or it is of another rank or weight, or not finite.
    """
    if eigens is None:
        raise ValueError(
            "corda: the layer has no `eigens`, expected what lora_ext.preprocess_corda(model, "
            "config, ...) leaves there: please run `preprocess_corda` first, with this model and "
            "config; a saved adapter needs it too (cache_file), unless it was converted to plain "
            "LoRA (path_initial_model_for_weight_conversion), or is loaded onto the base as this "
            "changed it, with init_lora_weights true in its adapter_config.json"
        )
    N, K = weight.shape
    U, S, V = (getattr(eigens, name).to(weight) for name in ("U_WC", "S_WC", "V_WC"))
    shapes = tuple(tuple(tensor.shape) for tensor in (U, S, V))
    if shapes != ((N, r), (r,), (K, r)):
        raise ValueError(
            f"corda: eigens: got U, S, V of shapes {shapes}, expected {((N, r), (r,), (K, r))}: "
            "make sure that the model and the config's r and rank_pattern are those of "
            "preprocess_corda, or of the one that wrote cache_file"
        )
    _check_finite("corda: eigens", (U, S, V))
    root = (S / scaling).sqrt()
    return root[:, None] * V.t(), U * root


def lora_ga_factors(
    gradient: Tensor,
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    direction: str,
    scale: str,
    stable_gamma: float,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """The adapter [r, K], [N, r] of singular vectors of a gradient: with it the first step goes
    where full training would go. As in PEFT by a randomised SVD, with its draws.

    Args:
        gradient: [N, K].
        rows: of the weight as it is stored: N, or K of a Conv1D, as PEFT counts.

    Raises:
        ValueError: another shape, NaN or Inf, no gradient at all, or fewer than 2 r vectors.
    """
    if gradient.shape != weight.shape:
        raise ValueError(
            f"lora_ga: gradient: got shape {tuple(gradient.shape)}, expected that of the weight, "
            f"{tuple(weight.shape)}: it is of another model"
        )
    if 2 * r > min(gradient.shape):
        raise ValueError(
            f"lora_ga: r: got {r} for a weight of shape {tuple(gradient.shape)}, expected at most "
            f"{min(gradient.shape) // 2}: it takes 2 r singular vectors; give this layer a smaller "
            "rank with rank_pattern"
        )
    _check_finite("lora_ga: gradient", (gradient,))
    if not gradient.any():
        raise ValueError("lora_ga: gradient: got zeros, expected some gradient of the layer")
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    for_A, for_B = _columns(direction, r)
    A, B, lengths = V[:, for_A].t(), U[:, for_B] * S[for_B], S[for_B]
    if scale == "stable":
        B = B * (rows**0.25 / stable_gamma**0.5)
    elif scale == "gd_scale":
        A, B = A / scaling, B / scaling
    elif scale == "weight_svd":
        _, largest, _ = torch.svd_lowrank(weight, q=r, niter=4)
        if lengths[0] > 0:
            B = B * (largest[0] / lengths[0])
    return A, B


def _columns(direction: str, r: int) -> tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]:
    """Which of 2 r singular vectors lora_A gets, and which lora_B."""
    first, second = list(range(r)), list(range(r, 2 * r))
    if direction == "ArBr":
        return list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))
    if direction == "A2rBr":
        return second, first
    if direction == "ArB2r":
        return first, second
    chosen = torch.randperm(2 * r)[:r]
    return chosen, chosen


def _check_finite(what: str, tensors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(f"{what}: holds NaN or Inf, expected finite values; calibrate again")
