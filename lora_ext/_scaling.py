"""Scalings in graphs that torch.compile makes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_for_any(scaling: float | Tensor) -> bool:
    """Whether this is being compiled for any value of scaling, as torch.compile does once it has
    changed. Operators take a number as a constant of the graph, which each value would compile
    again; a tensor that was multiplied by it is a value of the graph."""
    if not torch.compiler.is_compiling() or isinstance(scaling, Tensor):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    return not has_static_value(scaling)


def for_any(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
    """The same product with a scaling that is a constant, if it was none."""
    if not is_for_any(scaling):
        return lora_A, lora_B, scaling
    compute = torch.promote_types(lora_B.dtype, torch.float32)
    return lora_A.to(compute), lora_B.to(compute) * scaling, 1.0
