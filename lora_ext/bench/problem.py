"""The tensors of a case, shared by all contenders, and its fp64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext import reference
from lora_ext.bench.grid import Case
from lora_ext.quant import QuantizedWeight, quantize

SCALING = 2.0  # not 1, so that a contender that forgets it is found out

_SEED = 0
# Inputs rotate through more bytes than a last-level cache holds, within reason for small cases.
_CACHE_BYTES = 64 * 2**20
_MIN_BATCHES, _MAX_BATCHES = 2, 8


@dataclass(frozen=True)
class Batch:
    """One input of the layer and the gradient that arrives at its output."""

    x: Tensor  # [M, K], a leaf that requires grad
    dy: Tensor  # [M, N]


@dataclass(frozen=True)
class Problem:
    """A case with its tensors, all of the case's dtype."""

    case: Case
    weight: Tensor  # [N, K], frozen
    lora_A: Tensor  # [r, K], the initial value
    lora_B: Tensor  # [N, r], the initial value, not zero
    batches: tuple[Batch, ...]
    quantized: QuantizedWeight | None = None  # whose values the weight has

    @property
    def lora_alpha(self) -> float:
        return SCALING * self.case.rank


def make_problem(case: Case, device: torch.device, quant_type: str | None = None) -> Problem:
    """Draws random-normal tensors, with x·Wᵀ and h·Bᵀ of about unit size.

    Both terms then weigh the same, so that an error in either shows. Zeros would also run faster.
    With a quant_type ("nf4", "int8") the weight has the values of its codes.
    """
    generator = torch.Generator(device).manual_seed(_SEED)

    def normal(rows: int, columns: int, std: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return values.mul_(std).to(case.torch_dtype)

    M, K, N, r = case.tokens, case.in_features, case.out_features, case.rank
    batch_bytes = M * (K + N) * case.torch_dtype.itemsize
    count = min(max(math.ceil(_CACHE_BYTES / batch_bytes), _MIN_BATCHES), _MAX_BATCHES)
    weight = normal(N, K, K**-0.5)
    matrix = None if quant_type is None else quantize(weight, quant_type)
    return Problem(
        case,
        weight=weight if matrix is None else matrix.dequantize(case.torch_dtype),
        lora_A=normal(r, K, K**-0.5),
        lora_B=normal(N, r, r**-0.5),
        batches=tuple(Batch(normal(M, K).requires_grad_(), normal(M, N)) for _ in range(count)),
        quantized=matrix,
    )


def reference_outputs(problem: Problem, batch: Batch, mask: Tensor | None) -> dict[str, Tensor]:
    """Computes y, dx, dA and dB in fp64; mask is the keep mask [M, K] of the dropout."""
    x, lora_A, lora_B = (
        tensor.detach().double().requires_grad_()
        for tensor in (batch.x, problem.lora_A, problem.lora_B)
    )
    y = reference.lora_linear(
        x,
        problem.weight.double(),
        None,
        lora_A,
        lora_B,
        scaling=SCALING,
        dropout_p=problem.case.dropout_p,
        mask=mask,
    )
    grads = torch.autograd.grad(y, (x, lora_A, lora_B), batch.dy.double())
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), grads, strict=True))}
