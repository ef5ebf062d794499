"""Inputs of lora_mlp, and the same layers one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from grouped_problems import PAIRS
from multi_problems import Layer
from problems import UNIT, rms
from torch import Tensor

import lora_ext

F = torch.nn.functional
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda e: F.gelu(e, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda e: F.relu(e).square(),
}
PARTS = ("weight", "bias", "lora_A", "lora_B", "lora_bias")


@dataclass(frozen=True)
class Mlp:
    x: Tensor  # [..., K]
    layers: list[Layer]  # gate, up and down; or both in one, and down
    activation: str
    dy: Tensor  # [..., N]

    def leaves(self) -> dict[str, Tensor]:
        """The operands that require grad."""
        found: dict[str, Tensor | None] = {"x": self.x}
        for i, one in enumerate(self.layers):
            found |= {f"{name}.{i}": getattr(one, name) for name in PARTS}
        return {name: t for name, t in found.items() if t is not None and t.requires_grad}

    def fused(self, **options: bool) -> Tensor:
        def of(name: str) -> list[Tensor | None]:
            return [getattr(one, name) for one in self.layers]

        return lora_ext.lora_mlp(
            self.x,
            *(of(name) for name in PARTS),
            activation=self.activation,
            scalings=[one.scaling for one in self.layers],
            dropout_p=[one.dropout_p for one in self.layers],
            rng_states=of("rng_state"),
            **options,
        )

    def recomputed(self) -> Tensor:
        return self.fused(recompute=True)

    def separate(self) -> Tensor:
        return self._by(Layer.separate)

    def plain(self) -> Tensor:
        return self._by(Layer.plain)

    def noisy(self, unit: float) -> Tensor:
        """Where every layer's result, the product, and all their gradients are off by about a
        unit, each by another one."""

        def off(t: Tensor) -> Tensor:
            def noise(t: Tensor) -> Tensor:
                return t * (1 + unit * torch.randn(t.shape, dtype=t.dtype))

            t = t + (noise(t) - t).detach()
            if t.requires_grad:
                t.register_hook(noise)
            return t

        return self._by(lambda layer, x: off(layer.plain(x)), off)

    def _by(
        self,
        call: Callable[[Layer, Tensor], Tensor],
        product: Callable[[Tensor], Tensor] = lambda a: a,
    ) -> Tensor:
        *entries, down = self.layers
        made = [call(one, self.x) for one in entries]
        e, g = made if len(made) == 2 else made[0].chunk(2, -1)
        return call(down, product(ACTIVATIONS[self.activation](e) * g))

    def results(self, way: str, *arguments: float) -> dict[str, Tensor]:
        """y, and the gradients that there are."""
        y, leaves = getattr(self, way)(*arguments), self.leaves()
        if not y.requires_grad:
            return {"y": y}
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
        named = zip(leaves, grads, strict=True)
        return {"y": y.detach()} | {name: grad for name, grad in named if grad is not None}

    def in_double(self) -> Mlp:
        def double(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        layers = [
            replace(one, **{name: double(getattr(one, name)) for name in PARTS})
            for one in self.layers
        ]
        return replace(self, x=double(self.x), layers=layers, dy=self.dy.double())


def make_mlp(
    seed: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int] | None = None,
    activation: str | None = None,
) -> Mlp:
    """sizes: M, K, the inner width and N, of three layers."""
    choice = random.Random(f"{seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype, grad: bool = False, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return values.to(of).requires_grad_(grad)

    M, K, inner, N = sizes or (
        choice.choice([1, 2, 3, 15, 17, 40, 97, 200]),
        *(choice.choice([1, 8, 33, 72, 136, 300]) for _ in range(3)),
    )
    trains_base = choice.random() < 0.15
    adapter = choice.choice(PAIRS[dtype])
    widths = [(K, inner), (K, inner), (inner, N)]
    if sizes is None and choice.random() < 0.3:
        widths[:2] = [(K, 2 * inner)]
    p = choice.choice([0.0, 0.0, 0.1, 0.5])
    layers = []
    for columns, rows in widths:
        adapted, r = choice.random() < 0.75, choice.choice([1, 2, 8, 16, 17])
        scaling, own_p = choice.choice([1.0, 0.5, 2.0]), p if choice.random() < 0.7 else 0.3
        state = torch.tensor([choice.randrange(2**31), choice.randrange(2**31)])
        layers.append(
            Layer(
                weight=draw(rows, columns, grad=trains_base, std=max(columns, 1) ** -0.5),
                bias=draw(rows, grad=trains_base) if choice.random() < 0.4 else None,
                lora_A=draw(
                    r, columns, of=adapter, grad=choice.random() < 0.9, std=max(columns, 1) ** -0.5
                )
                if adapted
                else None,
                lora_B=draw(rows, r, of=adapter, grad=True, std=r**-0.5 / scaling)
                if adapted
                else None,
                lora_bias=draw(rows, of=adapter, grad=True)
                if adapted and choice.random() < 0.2
                else None,
                scaling=scaling,
                dropout_p=own_p,
                rng_state=state if adapted and own_p > 0.0 else None,
                dy=None,
            )
        )
    x, dy = draw(M, K), draw(M, N)
    form = choice.choice(["plain", "plain", "transposed", "batch"])
    if form == "transposed":
        x = x.t().contiguous().t()
    elif form == "batch" and M % 5 == 0:
        x, dy = x.view(5, M // 5, K), dy.view(5, M // 5, N)
    grad = choice.random() < 0.8
    return Mlp(x.requires_grad_(grad), layers, activation or choice.choice([*ACTIVATIONS]), dy)


def trained(dtype: torch.dtype, p: float, sizes: tuple[int, int, int, int]) -> Mlp:
    """All three have an adapter that trains, on a frozen base."""
    problem = make_mlp(3, dtype, sizes, "silu")
    layers = []
    for one in problem.layers:
        rows, columns = one.weight.shape
        A, B = torch.randn(4, columns, dtype=dtype), torch.randn(rows, 4, dtype=dtype)
        state = torch.tensor([1, 2]) if p else None
        frozen = {"weight": one.weight.detach(), "bias": None, "lora_bias": None}
        adapter = {"lora_A": A.requires_grad_(), "lora_B": B.requires_grad_()}
        layers.append(replace(one, **frozen, **adapter, dropout_p=p, rng_state=state))
    return replace(problem, x=problem.x.detach().requires_grad_(), layers=layers)


def bounds(problem: Mlp, wanted: dict[str, Tensor]) -> dict[str, float]:
    """What rounding to the type costs: ten times as much as it does to the exact results on
    average, by six draws; or, for sums in a compute type as wide, twice the error of plain PyTorch
    or of layers one by one. Six products follow one another, gradients counted."""
    draws, unit = 6, UNIT[problem.x.dtype]
    exact = problem.in_double()
    squares = dict.fromkeys(wanted, 0.0)
    for _ in range(draws):
        for name, noisy in exact.results("noisy", unit).items():
            if name in wanted:
                squares[name] += rms(noisy - wanted[name]) ** 2 / draws
    ways = [problem.results(way) for way in ("plain", "separate")]
    terms = max(problem.x.numel(), *(one.weight.numel() for one in problem.layers))
    compute = UNIT[torch.float64 if problem.x.dtype == torch.float64 else torch.float32]
    found = {}
    for name, want in wanted.items():
        other = max(rms(way[name].double() - want) for way in ways)
        sums = 6 * compute * terms**0.5 * rms(want)
        found[name] = max(2 * other, 10 * squares[name] ** 0.5, sums, 1e-30)
    return found
