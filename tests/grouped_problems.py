"""Inputs of lora_linear_grouped, and the same computation in plain PyTorch."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import torch
from problems import UNIT, rms
from torch import Tensor

import lora_ext
from lora_ext.functional import LowRank

PAIRS = {
    torch.float64: [torch.float64],
    torch.float32: [torch.float32],
    torch.bfloat16: [torch.bfloat16, torch.float32],
    torch.float16: [torch.float16, torch.float32],
}


@dataclass(frozen=True)
class Grouped:
    """A call, with a fixed mask."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    adapters: dict[str, LowRank]
    ids: Tensor  # [M]: places in adapters, -1 is the base; [M, k] with gates
    scale: Tensor | None  # [M]
    rng_state: Tensor
    dy: Tensor  # [M, N]
    gates: Tensor | None = None  # [M, k]

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def leaves(self) -> dict[str, Tensor]:
        """The operands that have gradients."""
        found = {"x": self.x, "weight": self.weight, "bias": self.bias, "scale": self.scale}
        found["gates"] = self.gates
        for name, one in self.adapters.items():
            found |= {f"{name}.A": one.lora_A, f"{name}.B": one.lora_B}
            found |= {f"{name}.bias": one.lora_bias}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def fused(self) -> Tensor:
        plan = lora_ext.batch(self.names, ids=self.ids, scale=self.scale, gates=self.gates)
        return lora_ext.lora_linear_grouped(
            self.x, self.weight, self.bias, self.adapters, plan, rng_state=self.rng_state
        )

    def plain(self) -> Tensor:
        y = torch.nn.functional.linear(self.x, self.weight, self.bias)
        for place, one in enumerate(self.adapters.values()):
            chosen = (self.ids == place).view(len(self.x), -1)
            rows = chosen.any(1).nonzero().flatten()
            d = self.x
            if one.dropout_p > 0.0:
                mask = lora_ext.dropout_mask(self.rng_state, *self.x.shape, one.dropout_p)
                survivor = 1 / (1 - one.dropout_p) if one.dropout_p < 1 else 0.0
                d = d * mask * survivor
            h = d[rows].to(one.lora_A.dtype) @ one.lora_A.T
            update = h @ one.lora_B.T
            if one.lora_bias is not None:
                update = update + one.lora_bias
            update = update * one.scaling
            if self.scale is not None:
                update = update * self.scale[rows, None].to(update.dtype)
            if self.gates is not None:
                own = (self.gates * chosen).sum(1)
                update = update * own[rows, None].to(update.dtype)
            y = y.index_add(0, rows, update.to(y.dtype))
        return y

    def in_double(self) -> Grouped:
        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().double().requires_grad_()

        adapters = {
            name: one._replace(
                lora_A=double(one.lora_A),
                lora_B=double(one.lora_B),
                lora_bias=double(one.lora_bias),
            )
            for name, one in self.adapters.items()
        }
        tensors = {n: double(getattr(self, n)) for n in ("x", "weight", "bias", "scale", "gates")}
        return replace(self, adapters=adapters, dy=self.dy.double(), **tensors)  # type: ignore[arg-type]

    def results(self, y: Tensor) -> dict[str, Tensor]:
        """y and the gradients; without those of adapters that have no row."""
        leaves = self.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
        found = dict(zip(leaves, grads, strict=True)) | {"y": y.detach()}
        return {name: value for name, value in found.items() if value is not None}


def make_adapter(generator: torch.Generator, like: Tensor, N: int, K: int, choice: random.Random,
                 dtype: torch.dtype, bias: bool = False) -> LowRank:  # fmt: skip
    r = choice.choice([1, 2, 3, 4, 8, 16, 17, 32, 64])

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / max(shape[-1], 1) ** 0.5).to(dtype).requires_grad_()

    p = choice.choice([0.0, 0.0, 0.1, 0.5])
    return LowRank(
        draw(r, K), draw(N, r), draw(N) if bias else None, choice.choice([1.0, 0.5, 2.5]), p
    )


def make_grouped(seed: int, dtype: torch.dtype) -> Grouped:
    choice = random.Random(f"{seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)
    M = choice.choice([1, 2, 5, 16, 17, 40, 97, 130])
    K, N = choice.choice([(64, 32), (33, 70), (136, 257), (300, 40)])
    slots = choice.randint(1, 6)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(of).requires_grad_()

    x = draw(M, K)
    weight = (draw(N, K) / K**0.5).detach().requires_grad_()
    adapters = {
        f"a{i}": make_adapter(
            generator, x, N, K, choice, choice.choice(PAIRS[dtype]), choice.random() < 0.3
        )
        for i in range(slots)
    }
    if choice.random() < 0.4:  # a slot for each row
        ids = torch.randint(-1, slots, (M,), generator=generator)
    else:  # segments, of which some may be empty, and some adapters have none or several
        cuts = sorted(choice.randint(0, M) for _ in range(slots + 1))
        lengths = torch.tensor(
            [cuts[0], *(b - a for a, b in itertools.pairwise(cuts)), M - cuts[-1]]
        )
        owners = torch.randint(-1, slots, (len(lengths),), generator=generator)
        ids = owners.repeat_interleave(lengths)
    scale = None
    if choice.random() < 0.3:
        scale = draw(M, of=choice.choice([torch.float32, dtype]))
    return Grouped(
        x,
        weight,
        draw(N) if choice.random() < 0.5 else None,
        adapters,
        ids,
        scale,
        torch.tensor([choice.randrange(2**31), choice.randrange(2**31)]),
        draw(M, N).detach(),
    )


def make_gated(seed: int, dtype: torch.dtype) -> Grouped:
    """Rows with several adapters: k of them, fewer in some rows, or all."""
    problem = make_grouped(seed, dtype)
    choice = random.Random(f"gates {seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)
    M, slots = len(problem.x), len(problem.adapters)
    if choice.random() < 0.3:
        ids = torch.arange(slots).expand(M, slots)
    else:
        k = choice.randint(1, slots)
        ids = torch.rand(M, slots, generator=generator).argsort(1)[:, :k]
        ids = torch.where(torch.rand(M, k, generator=generator) < 0.2, -1, ids)
    gates = torch.randn(ids.shape, generator=generator)
    gates = gates.to(choice.choice([torch.float32, dtype])).requires_grad_()
    return replace(problem, ids=ids, gates=gates)


def bounds(problem: Grouped, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Twice the error of plain PyTorch in the same dtypes, or what rounding once to the type and
    sums in the compute type cost."""
    plain = problem.results(problem.plain())
    leaves = problem.leaves() | {"y": problem.x}
    terms = max(problem.x.numel(), problem.weight.numel(), problem.dy.numel())
    found = {}
    for name, want in wanted.items():
        dtype = leaves[name].dtype
        compute = UNIT[torch.float64 if problem.x.dtype == torch.float64 else torch.float32]
        own = (2 * UNIT[dtype] + compute * terms**0.5) * rms(want)
        error = rms(plain[name].double() - want) if name in plain else 0.0
        found[name] = max(2 * error, own, 1e-30)
    return found
