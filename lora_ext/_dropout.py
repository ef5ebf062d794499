"""The masks of dropout, as functions of their states."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.arguments import check_kinds


def draw_rng_state(x: Tensor) -> Tensor:
    """The state of one dropout mask: int64 [2] (seed, offset), on the device of `x`.

    Drawn from that device's torch generator, so `torch.manual_seed` and activation checkpointing
    govern it.
    """
    if torch.compiler.is_compiling():
        # Draws of the same tensor would be taken for the same subexpression, and the layers that
        # read it would drop the same elements; tensors that are empty never are.
        x = torch.empty(0, device=x.device)
    try:
        return torch.ops.lora_ext.draw_rng_state(x)  # type: ignore[no-any-return]
    except (TypeError, RuntimeError):
        check_kinds("draw_rng_state", x=x)
        raise


def dropout_mask(rng_state: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The mask that `rng_state` stands for: bool [rows, columns], True where dropout keeps.

    The fused operators never build it; it is for tests and inspection. Kept with probability
    `1 - dropout_p`, rounded to a multiple of 2^-16.
    """
    try:
        return torch.ops.lora_ext.dropout_mask(  # type: ignore[no-any-return]
            rng_state, rows, columns, dropout_p
        )
    except (TypeError, RuntimeError):
        check_kinds(
            "dropout_mask", rng_state=rng_state, rows=rows, columns=columns, dropout_p=dropout_p
        )
        raise


def dropout(x: Tensor, rng_state: Tensor, dropout_p: float) -> Tensor:
    """x [..., K] as `lora_linear` drops it out for this `rng_state` (see `draw_rng_state`): divided
    by `1 - dropout_p` where kept, else 0. Differentiable; keeps `rng_state` alone."""
    try:
        return torch.ops.lora_ext.dropout(x, rng_state, dropout_p)  # type: ignore[no-any-return]
    except (TypeError, RuntimeError):
        check_kinds("dropout", x=x, rng_state=rng_state, dropout_p=dropout_p)
        raise
