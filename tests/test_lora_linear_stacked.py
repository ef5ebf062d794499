"""lora_linear_grouped of a stack of weights: bit for bit what calls of each matrix alone give,
against float64, and under transforms, on the CPU and as backends without kernels compose it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from devices import same_bits
from grouped_problems import PAIRS
from problems import UNIT, kept_for_backward, rms
from torch import Tensor

import lora_ext

OPS = torch.ops.lora_ext
F = torch.nn.functional
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in PAIRS]
SEEDS = range(25)


@dataclass(frozen=True)
class Slot:
    matrix: int
    rows: Tensor  # int32, of its matrix
    A: Tensor
    B: Tensor
    lora_bias: Tensor | None
    scaling: float
    p: float


@dataclass(frozen=True)
class Stack:
    x: Tensor  # [M, K]
    weight: Tensor  # [E, N, K]
    bias: Tensor | None  # [E, N]
    rows: list[int]  # of each matrix
    slots: list[Slot]
    factor: Tensor | None  # of each entry of order
    state: Tensor
    dy: Tensor

    def leaves(self) -> dict[str, Tensor]:
        found = {"x": self.x, "weight": self.weight, "bias": self.bias, "factor": self.factor}
        for j, slot in enumerate(self.slots):
            found |= {f"A{j}": slot.A, f"B{j}": slot.B, f"lora_bias{j}": slot.lora_bias}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def arguments(self, slots: list[Slot], factor: Tensor | None) -> list[Any]:
        """What follows x, weight and bias, but for rounds and the stack."""
        none = self.x.new_empty(0)
        biased = any(slot.lora_bias is not None for slot in slots)
        return [
            *([slot.A for slot in slots], [slot.B for slot in slots]),
            [none if s.lora_bias is None else s.lora_bias for s in slots] if biased else [],
            torch.cat([torch.empty(0, dtype=torch.int32), *(slot.rows for slot in slots)]),
            *([len(slot.rows) for slot in slots], factor, [slot.scaling for slot in slots]),
            *([slot.p for slot in slots], self.state),
        ]

    def of_stack(self) -> list[Any]:
        counts = [sum(s.matrix == e for s in self.slots) for e in range(len(self.rows))]
        arguments = self.arguments(self.slots, self.factor)
        return [self.x, self.weight, self.bias, *arguments, [], self.rows, counts]

    def fused(self) -> Tensor:
        return OPS.lora_linear_grouped(*self.of_stack())  # type: ignore[no-any-return]

    def one_by_one(self) -> Tensor:
        """A call for each matrix: lora_linear where one adapter has all rows."""
        parts, entry = [], 0
        for e, x in enumerate(torch.split(self.x, self.rows)):
            own = [slot for slot in self.slots if slot.matrix == e]
            entries = sum(len(slot.rows) for slot in own)
            factor = None if self.factor is None else self.factor[entry : entry + entries]
            entry += entries
            bias = None if self.bias is None else self.bias[e]
            if not len(x):
                continue
            if not own:
                parts.append(F.linear(x, self.weight[e], bias))
            elif len(own) == 1 and entries == len(x) and factor is None:
                (one,) = own
                parts.append(
                    lora_ext.lora_linear(
                        *(x, self.weight[e], bias, one.A, one.B, one.lora_bias),
                        scaling=one.scaling, dropout_p=one.p, rng_state=self.state,
                    )
                )  # fmt: skip
            else:
                arguments = self.arguments(own, factor)
                parts.append(OPS.lora_linear_grouped(x, self.weight[e], bias, *arguments))
        return torch.cat(parts)

    def plain(self) -> Tensor:
        parts, entry = [], 0
        for e, x in enumerate(torch.split(self.x, self.rows)):
            y = F.linear(x, self.weight[e], None if self.bias is None else self.bias[e])
            for slot in self.slots:
                if slot.matrix != e:
                    continue
                d = x
                if slot.p > 0:
                    mask = lora_ext.dropout_mask(self.state, *x.shape, slot.p)
                    d = x * mask / (1 - slot.p)
                rows = slot.rows.long()
                update = d[rows].to(slot.A.dtype) @ slot.A.T @ slot.B.T
                if slot.lora_bias is not None:
                    update = update + slot.lora_bias
                update = update * slot.scaling
                if self.factor is not None:
                    own = self.factor[entry : entry + len(rows), None]
                    update = update * own.to(update.dtype)
                y = y.index_add(0, rows, update.to(y.dtype))
                entry += len(rows)
            parts.append(y)
        return torch.cat(parts)

    def results(self, y: Tensor) -> dict[str, Tensor]:
        leaves = self.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
        zeros = [torch.zeros_like(leaf) for leaf in leaves.values()]  # of slots without rows
        found = [zero if g is None else g for g, zero in zip(grads, zeros, strict=True)]
        return dict(zip(leaves, found, strict=True)) | {"y": y.detach()}

    def changed(self, change: Any) -> Stack:
        """Every operand passed through `change`."""

        def one(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor.detach()).requires_grad_()

        slots = [replace(s, A=one(s.A), B=one(s.B), lora_bias=one(s.lora_bias)) for s in self.slots]
        operands = {name: one(getattr(self, name)) for name in ("x", "weight", "bias", "factor")}
        return replace(self, slots=slots, dy=change(self.dy), **operands)  # type: ignore[arg-type]


def make_stack(seed: int, dtype: torch.dtype, small: bool = False, drops: bool = True) -> Stack:
    choice = random.Random(f"{seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / max(shape[-1], 1) ** 0.5).to(of).requires_grad_()

    K, N = (4, 3) if small else choice.choice([(64, 32), (33, 70), (136, 257)])
    sizes = [0, 1, 2, 3] if small else [0, 1, 2, 17, 40, 97]
    rows = [choice.choice(sizes) for _ in range(1 if small else 5)] + [0, 1, sizes[-1]]
    choice.shuffle(rows)
    M = sum(rows)
    weight = draw(len(rows), N, K).detach()
    if choice.random() < 0.5:  # as gpt-oss keeps it
        weight = weight.mT.contiguous().mT
    slots = []
    for matrix, count in enumerate(rows):
        kind = choice.choice(["base", "one", "one", "some"])
        own = 0 if kind == "base" else 1 if kind == "one" else 2
        place = torch.full((count,), 0)
        if kind == "some":
            place = torch.randint(-1, 2, (count,), generator=generator)
        for j in range(own):
            adapter, r = (
                choice.choice(PAIRS[dtype]),
                choice.choice([1, 2] if small else [1, 2, 8, 17]),
            )
            slots.append(
                Slot(
                    matrix,
                    (place == j).nonzero().flatten().int(),
                    draw(r, K, of=adapter),
                    draw(N, r, of=adapter),
                    draw(N, of=adapter) if choice.random() < 0.3 else None,
                    choice.choice([1.0, 0.5, 2.5]),
                    choice.choice([0.0, 0.0, 0.3]) if drops else 0.0,
                )
            )
    entries = sum(len(slot.rows) for slot in slots)
    factor = draw(entries) if choice.random() < 0.3 else None
    bias = draw(len(rows), N) if choice.random() < 0.5 else None
    state = torch.tensor([choice.randrange(2**31), choice.randrange(2**31)])
    weight.requires_grad_()
    return Stack(draw(M, K), weight, bias, rows, slots, factor, state, draw(M, N).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_each_matrix_alone(dtype: torch.dtype) -> None:
    kinds = set()
    for seed in SEEDS:
        stack = make_stack(seed, dtype)
        found, wanted = stack.results(stack.fused()), stack.results(stack.one_by_one())
        base = torch.tensor([all(s.matrix != e for s in stack.slots) for e in range(8)])
        for name, want in wanted.items():
            got = found[name]
            if name == "weight":  # of the base alone autograd multiplies the transposes
                torch.testing.assert_close(got[base], want[base])
                got, want = got[~base], want[~base]
            assert same_bits(got, want), f"{seed} {name}"
        for e, rows in enumerate(stack.rows):
            own = [s for s in stack.slots if s.matrix == e]
            kinds.add((len(own), min(rows, 2), stack.factor is None, any(s.p > 0 for s in own)))
    assert len(kinds) > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    """Errors are no more than twice those of plain PyTorch, or what rounding once to the type and
    sums in the compute type cost."""
    for seed in SEEDS:
        stack = make_stack(seed, dtype)
        exact = stack.changed(lambda tensor: tensor.double())
        wanted, plain = exact.results(exact.plain()), stack.results(stack.plain())
        leaves = stack.leaves() | {"y": stack.x}
        compute = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
        terms = max(stack.x.numel(), stack.dy.numel(), stack.weight[0].numel())
        for name, got in stack.results(stack.fused()).items():
            want = wanted[name]
            own = (2 * UNIT[leaves[name].dtype] + compute * terms**0.5) * rms(want)
            bound = max(own, 2 * rms(plain[name].double() - want), 1e-30)
            error = rms(got.double() - want)
            assert error <= bound, f"{seed} {name}: error {error:.3g}, at most {bound:.3g} allowed"


@pytest.mark.parametrize("seed", range(20))
def test_gradcheck(seed: int) -> None:
    stack = make_stack(seed, torch.float64, small=True)
    leaves = list(stack.leaves().values())
    assert torch.autograd.gradcheck(lambda *_: stack.fused(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: stack.fused(), leaves)


def test_a_second_derivative_without_x_is_refused() -> None:
    stack = make_stack(0, torch.float64, small=True, drops=False)
    for slot in stack.slots:
        slot.A.requires_grad_(False)
    frozen = replace(stack, weight=stack.weight.detach(), factor=None)
    leaves = [frozen.x, frozen.slots[0].B]
    grads = torch.autograd.grad(frozen.fused(), leaves, frozen.dy)
    assert all(grad.isfinite().all() for grad in grads)
    one = frozen.arguments(frozen.slots[:1], None)
    matrix = OPS.lora_linear_grouped(frozen.x, frozen.weight[0], None, *one)
    for y in (frozen.fused(), matrix):
        with pytest.raises(RuntimeError, match="double backward: x was not kept"):
            torch.autograd.grad(y, leaves, frozen.dy, create_graph=True)


COMPOSED = torch.DispatchKey.CompositeExplicitAutograd


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_backends_without_kernels_of_stacks(dtype: torch.dtype) -> None:
    """They call the operators of one matrix, here the CPU's: the same bits."""
    for seed in SEEDS:
        stack = make_stack(seed, dtype)
        operands = stack.of_stack()
        y, h = OPS.lora_linear_grouped_fwd(*operands, return_h=True)
        fwd = OPS.lora_linear_grouped_fwd.default
        for got, want in zip(fwd._op_dk(COMPOSED, *operands, True), (y, h), strict=True):
            assert same_bits(got, want), seed
        x, weight, _, *others = operands
        mask = [True, True, True, stack.factor is not None]
        wanted = [7 if s.lora_bias is not None else 3 for s in stack.slots]
        call = (stack.dy, x, h, weight, *others, mask, wanted)
        bwd = OPS.lora_linear_grouped_bwd.default
        for got, want in zip(bwd._op_dk(COMPOSED, *call), bwd(*call), strict=True):
            pairs = ([one] if isinstance(one, Tensor) else one for one in (got, want))
            for a, b in zip(*pairs, strict=True):
                assert a.shape == b.shape and same_bits(a, b), seed


def test_leading_dimensions_and_rows_apart() -> None:
    stack = make_stack(1, torch.float32)
    x = torch.randn(2, 3, stack.x.shape[1] + 1)[..., 1:]
    six = replace(stack, rows=[6, *[0] * 7], factor=None)
    slots = [replace(stack.slots[0], matrix=0, rows=torch.arange(6).int())]
    found = replace(six, x=x, slots=slots).fused()
    wanted = replace(six, x=x.reshape(6, -1), slots=slots).one_by_one()
    assert torch.equal(found, wanted.view(2, 3, -1))
    none = replace(six, x=x[:0], rows=[0] * 8, slots=[replace(slots[0], rows=slots[0].rows[:0])])
    assert none.fused().shape == (0, 3, wanted.shape[1])


def test_keeps_x_once_and_no_matrix() -> None:
    stack = make_stack(2, torch.float32, drops=False)
    stack.weight.requires_grad_(False)
    kept = kept_for_backward(lambda: stack.fused())
    given = {leaf.data_ptr() for leaf in stack.leaves().values()}
    made = [t for t in kept if t.is_floating_point() and t.data_ptr() not in given]
    assert sum(t.numel() for t in made) == sum(len(s.rows) * len(s.A) for s in stack.slots)
    assert sum(t.data_ptr() == stack.x.data_ptr() for t in kept) == 1


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(adapter: torch.dtype) -> None:
    stack = make_stack(3, torch.float32)
    slots = [replace(s, A=s.A.to(adapter), B=s.B.to(adapter), lora_bias=None) for s in stack.slots]
    stack = replace(stack, slots=slots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stack.fused()
    bf16 = {
        name: None if getattr(stack, name) is None else getattr(stack, name).bfloat16()
        for name in ("x", "weight", "bias")
    }
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, replace(stack, **bf16).fused())


def test_forward_mode_and_vmap() -> None:
    stack = make_stack(4, torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(stack.x.detach(), torch.randn_like(stack.x))
        found, wanted = (
            torch.autograd.forward_ad.unpack_dual(y).tangent
            for y in (replace(stack, x=dual).fused(), replace(stack, x=dual).plain())
        )
    torch.testing.assert_close(found, wanted)
    several = torch.randn(3, *stack.x.shape, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: replace(stack, x=x).fused())(several)
    torch.testing.assert_close(mapped, torch.stack([replace(stack, x=x).plain() for x in several]))
