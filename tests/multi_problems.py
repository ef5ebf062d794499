"""Inputs of lora_linear_multi, and the same layers one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from grouped_problems import PAIRS
from problems import UNIT, rms
from torch import Tensor

import lora_ext


@dataclass(frozen=True)
class Layer:
    """One of the layers, with a fixed mask."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor | None  # [r, K]
    lora_B: Tensor | None  # [N, r]
    lora_bias: Tensor | None  # [N]
    scaling: float
    dropout_p: float
    rng_state: Tensor | None
    dy: Tensor | None  # [..., N]; None: nothing asks for a gradient of y

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else len(self.lora_A)

    def separate(self, x: Tensor) -> Tensor:
        if self.lora_A is None or self.lora_B is None:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return lora_ext.lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_bias,
            scaling=self.scaling, dropout_p=self.dropout_p, rng_state=self.rng_state,
        )  # fmt: skip

    def plain(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        d = x
        if self.dropout_p > 0.0:
            assert self.rng_state is not None
            rows = x.numel() // max(x.shape[-1], 1)
            mask = lora_ext.dropout_mask(self.rng_state, rows, x.shape[-1], self.dropout_p)
            d = x * mask.view(x.shape) / (1 - self.dropout_p)
        update = d.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        if self.lora_bias is not None:
            update = update + self.lora_bias
        return y + (update * self.scaling).to(y.dtype)


@dataclass(frozen=True)
class Multi:
    x: Tensor  # [..., K]
    layers: list[Layer]

    def leaves(self) -> dict[str, Tensor]:
        """The operands that require grad."""
        found: dict[str, Tensor | None] = {"x": self.x}
        for i, one in enumerate(self.layers):
            for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias"):
                found[f"{name}.{i}"] = getattr(one, name)
        return {name: t for name, t in found.items() if t is not None and t.requires_grad}

    def fused(self) -> list[Tensor]:
        def of(name: str) -> list[Tensor | None]:
            return [getattr(one, name) for one in self.layers]

        return lora_ext.lora_linear_multi(
            self.x, *(of(name) for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias")),
            scalings=[one.scaling for one in self.layers],
            dropout_p=[one.dropout_p for one in self.layers],
            rng_states=of("rng_state"),
        )  # type: ignore[arg-type]  # fmt: skip

    def separate(self) -> list[Tensor]:
        return [one.separate(self.x) for one in self.layers]

    def plain(self) -> list[Tensor]:
        return [one.plain(self.x) for one in self.layers]

    def results(self, ys: list[Tensor]) -> dict[str, Tensor]:
        """Every y, and the gradients that there are."""
        leaves = self.leaves()
        found = {f"y.{i}": y.detach() for i, y in enumerate(ys)}
        pairs = [
            (y, one.dy)
            for y, one in zip(ys, self.layers, strict=True)
            if one.dy is not None and y.requires_grad
        ]
        if not pairs or not leaves:
            return found
        outputs, dys = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), dys, allow_unused=True)
        named = zip(leaves, grads, strict=True)
        return found | {name: grad for name, grad in named if grad is not None}

    def in_double(self) -> Multi:
        return self._of(Tensor.double)

    def without_signs(self) -> dict[str, Tensor]:
        """The results of the operands' absolute values: each at least the sum of the absolute
        values that the result is the sum of."""
        absolute = self._of(Tensor.abs)
        return absolute.results(absolute.plain())

    def _of(self, change: Callable[[Tensor], Tensor]) -> Multi:
        def changed(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return change(tensor.detach()).requires_grad_(tensor.requires_grad)

        names = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "dy")
        layers = [
            replace(one, **{name: changed(getattr(one, name)) for name in names})
            for one in self.layers
        ]
        return Multi(changed(self.x), layers)  # type: ignore[arg-type]


def make_multi(seed: int, dtype: torch.dtype, *, all_grads: bool = False) -> Multi:
    """With all_grads everything requires grad and every y has a gradient."""
    choice = random.Random(f"{seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)
    M = choice.choice([1, 2, 3, 5, 15, 17, 40, 64, 97, 130, 200])
    K = choice.choice([8, 33, 72, 136, 300, 1040])
    adapter_rank = choice.choice([2, 4, 8, 16, 17, 32, 64])  # four of 32 run one by one

    def draw(*shape: int, of: torch.dtype = dtype, grad: bool = True, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return values.to(of).requires_grad_(all_grads or grad)

    trains_base, p = choice.random() < 0.2, choice.choice([0.0, 0.0, 0.1, 0.5])
    same = choice.random() < 0.5  # rank and dropout of all
    adapter = choice.choice(PAIRS[dtype])
    layers = []
    for _ in range(choice.randint(1, 4)):
        N = choice.choice([1, 7, 40, 64, 129])
        r = adapter_rank if same else choice.choice([1, 2, 3, 8, 16, 17, 40])
        of = adapter if choice.random() < 0.9 else choice.choice(PAIRS[dtype])
        adapted, own_p = choice.random() < 0.85, p if same else choice.choice([0.0, 0.3])
        scaling = choice.choice([1.0, 0.5, 2.0])
        state = torch.tensor([choice.randrange(2**31), choice.randrange(2**31)])
        layers.append(
            Layer(
                weight=draw(N, K, grad=trains_base, std=K**-0.5),
                bias=draw(N, grad=trains_base) if choice.random() < 0.5 else None,
                lora_A=draw(r, K, of=of, grad=choice.random() < 0.9, std=K**-0.5)
                if adapted
                else None,
                lora_B=draw(N, r, of=of, std=r**-0.5 / scaling) if adapted else None,
                lora_bias=draw(N, of=of) if adapted and choice.random() < 0.2 else None,
                scaling=scaling,
                dropout_p=own_p,
                rng_state=state if adapted and own_p > 0.0 else None,
                dy=draw(M, N).detach() if all_grads or choice.random() < 0.9 else None,
            )
        )
    x = draw(M, K, grad=choice.random() < 0.8)
    form = choice.choice(["plain", "plain", "transposed", "batch"])
    if form == "transposed":
        x = x.detach().t().contiguous().t().requires_grad_(x.requires_grad)
    elif form == "batch" and M % 5 == 0:
        x = x.detach().view(5, M // 5, K).requires_grad_(x.requires_grad)
        layers = [
            one if one.dy is None else replace(one, dy=one.dy.view(5, M // 5, -1)) for one in layers
        ]
    return Multi(x, layers)


def bounds(problem: Multi, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Twice the error of plain PyTorch in the same dtypes, or what rounding once to the type and
    sums in the compute type cost.

    float64 has no wider reference, and the yardstick may be wrong by the very same roundings: there
    a sum of n terms errs by sqrt(n) roundings of what they add up to without their signs.
    """
    plain = problem.results(problem.plain())
    in_double = problem.x.dtype == torch.float64
    summed = problem.without_signs() if in_double else wanted
    leaves = problem.leaves()
    widest = max(one.weight.numel() for one in problem.layers)
    terms = max(problem.x.numel(), widest)
    found = {}
    for name, want in wanted.items():
        dtype = leaves[name].dtype if name in leaves else problem.x.dtype
        compute = UNIT[torch.float64 if in_double else torch.float32]
        own = 2 * UNIT[dtype] * rms(want) + compute * terms**0.5 * rms(summed[name])
        found[name] = max(2 * rms(plain[name].double() - want), own, 1e-30)
    return found
