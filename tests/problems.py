"""Inputs that the tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lora_ext
from lora_ext import reference

NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")


@dataclass
class Problem:
    """Operands of one lora_linear call, all requiring grad, with B ≠ 0 and a fixed mask."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    lora_bias: Tensor | None  # [N]
    scaling: float
    dropout_p: float
    rng_state: Tensor | None
    mask: Tensor | None  # [M, K]
    dy: Tensor  # [..., N]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_bias

    def fused(self, *operands: Tensor | None) -> Tensor:
        return lora_ext.lora_linear(
            *(operands or self.operands),
            scaling=self.scaling,
            dropout_p=self.dropout_p,
            rng_state=self.rng_state,
        )

    def plain(self, *operands: Tensor | None) -> Tensor:
        return reference.lora_linear(
            *(operands or self.operands),
            scaling=self.scaling,
            dropout_p=self.dropout_p,
            mask=self.mask,
        )

    def exact_operands(self) -> list[Tensor | None]:
        return [None if t is None else t.detach().double().requires_grad_() for t in self.operands]


def make_problem(
    rows: tuple[int, ...] = (37,),
    K: int = 72,
    N: int = 40,
    r: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    lora_bias: bool = False,
    dropout_p: float = 0.0,
    scaling: float = 2.0,
    seed: int = 0,
) -> Problem:
    """`rows` are the leading sizes of x. The low-rank part is about as large as the base."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, std: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return values.to(as_dtype).requires_grad_()

    x = normal(*rows, K)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rng_state = lora_ext.draw_rng_state(x) if dropout_p > 0 else None
    mask = None
    if rng_state is not None:
        mask = lora_ext.dropout_mask(rng_state, x.numel() // max(K, 1), K, dropout_p)
    return Problem(
        x=x,
        weight=normal(N, K, std=max(K, 1) ** -0.5),
        bias=normal(N) if bias else None,
        lora_A=normal(r, K, std=max(K, 1) ** -0.5, as_dtype=adapter_dtype),
        lora_B=normal(N, r, std=max(r, 1) ** -0.5 / scaling, as_dtype=adapter_dtype),
        lora_bias=normal(N, as_dtype=adapter_dtype) if lora_bias else None,
        scaling=scaling,
        dropout_p=dropout_p,
        rng_state=rng_state,
        mask=mask,
        dy=normal(*rows, N).detach(),
    )


def gradients(y: Tensor, operands: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in operands if t is not None], dy))


def rms(error: Tensor) -> float:
    return error.double().pow(2).mean().sqrt().item() if error.numel() else 0.0
