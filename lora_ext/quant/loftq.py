"""LoftQ (Li et al., 2023, arXiv:2310.08659): adapters that make up for the error of quantizing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_ext.quant.encode import quantize


def low_rank(residual: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """lora_A [r, K] and lora_B [N, r] for which `scaling * lora_B @ lora_A` is nearest to a matrix
    [N, K].

    Raises:
        ValueError: scaling is not a finite number above 0.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"loftq: scaling: got {scaling}, expected a finite number above 0")
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def quantized_and_adapter(
    weight: Tensor, r: int, scaling: float, bits: int = 4, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, lora_A, lora_B) with `Q + scaling * lora_B @ lora_A` near to weight [N, K]; Q are
    values of codes: of NF4 in blocks of 64, or of LLM.int8(), as bitsandbytes quantizes. Each
    iteration quantizes what the adapter leaves, then finds the adapter for what the codes leave,
    as PEFT does; the best is returned, which need not be the last. Where the weight is of 16 bits
    that is searched twice, with the values that it will hold and, as PEFT does, with those of the
    codes: after several iterations either may be the better.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    values = weight.to(exact)
    best, least = None, float("inf")
    for held in {weight.dtype: 0, exact: 0} if iterations > 1 else [weight.dtype]:
        rest = values
        for _ in range(iterations):
            if bits == 4:
                matrix = quantize(rest.float(), "nf4")
            else:
                matrix = quantize(rest.half(), "int8")  # as a Linear8bitLt does
            of_codes = matrix.dequantize(torch.float32)
            residual = values - of_codes.to(held).to(exact)
            lora_A, lora_B = low_rank(residual, r, scaling)
            product = scaling * lora_B @ lora_A
            rest = values - product
            Q = of_codes.to(weight.dtype)
            error = torch.linalg.matrix_norm(rest - Q.to(exact)).item()
            if best is None or error < least:
                best, least = (Q, lora_A, lora_B), error
    assert best is not None
    return best
