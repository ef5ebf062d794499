"""Inputs that the tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lora_ext
from lora_ext import reference

# Of one rounding, relative to its value: half an ulp at 1.0 of the wide types; of the 16-bit types,
# which are summed in float32, a quarter of one, about the RMS error. A single one of theirs may err
# by 2 * UNIT, finfo(dtype).eps / 2.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}
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
    device: str = "cpu",
) -> Problem:
    """`rows` are the leading sizes of x. The low-rank part is about as large as the base. Values
    and mask are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, std: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return values.to(device, as_dtype).requires_grad_()

    x = normal(*rows, K)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = lora_ext.draw_rng_state(torch.empty(0)) if dropout_p > 0 else None
    rng_state = None if drawn is None else drawn.to(device)
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


def results(y: Tensor, operands: list[Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of the operands, named y and as the operands."""
    names = [name for name, tensor in zip(NAMES, operands, strict=True) if tensor is not None]
    return {"y": y.detach(), **dict(zip(names, gradients(y, operands, dy), strict=True))}


def exact_results(p: Problem) -> dict[str, Tensor]:
    operands = p.exact_operands()
    return results(p.plain(*operands), operands, p.dy.double())


def plain_results(p: Problem) -> dict[str, Tensor]:
    """The same by plain PyTorch in the problem's own dtypes."""
    return results(p.plain(), list(p.operands), p.dy)


def expected_sizes(p: Problem) -> dict[str, float]:
    """RMS of each result if the signs of its terms were random: the same sums of squares."""
    squares = copy.copy(p)
    for name in (*NAMES, "dy"):
        tensor = getattr(p, name)
        if tensor is not None:
            setattr(squares, name, tensor.detach().double().square().requires_grad_(name != "dy"))
    # The plain result has the survivors' factor once, its square is due; a lora_bias gets it, too.
    squares.scaling = p.scaling**2 / (1 - p.dropout_p if p.dropout_p < 1 else 1)
    return {name: t.mean().sqrt().item() for name, t in exact_results(squares).items()}


def kernel_bound(p: Problem, dtype: torch.dtype) -> float:
    """The error of a result of this dtype that the CUDA kernels may have, over its expected size.

    h and dh are rounded for the base product's sums, and the result once. The gradient of a float
    adapter is not, but its three factors are 16 bits and a remainder of as many. Errors are as
    large as h and dh are, whose expected size is that of many values: the RMS of n is off by
    1 / sqrt(2 n), here four times of that.
    """
    base = p.x.dtype
    roundings = 2 * UNIT[base] if dtype == base else 3 * UNIT[base] ** 2
    N, K = p.weight.shape
    M = p.x.numel() // max(K, 1)
    few = 1 + 4 / (2 * max(M * p.lora_A.shape[0], 1)) ** 0.5
    compute = torch.float64 if base == torch.float64 else torch.float32
    return few * (roundings + UNIT[compute] * max(M, N, K) ** 0.5)


def kept_for_backward(call: Callable[[], object]) -> list[Tensor]:
    """What a call saves, each time that it does."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept
