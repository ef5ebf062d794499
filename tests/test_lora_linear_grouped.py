"""lora_linear_grouped: against float64 and plain PyTorch, mixed batches against isolated ones bit
for bit, and what it keeps and refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_problems import PAIRS, Grouped, bounds, make_adapter, make_grouped
from problems import kept_for_backward, rms

import lora_ext
from lora_ext.functional import LowRank

SEEDS = range(80)  # of each dtype
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in PAIRS]
F = torch.nn.functional


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    """And rows without adapter those of the base, bit for bit."""
    for seed in SEEDS:
        problem = make_grouped(seed, dtype)
        exact = problem.in_double()
        wanted = exact.results(exact.plain())
        found = problem.results(problem.fused())
        present = {f"a{i}." for i in problem.ids.unique().tolist() if i >= 0}
        for name, bound in bounds(problem, wanted).items():
            if name.startswith("a") and name.split(".")[0] + "." not in present:
                assert name not in found, f"{seed}: a gradient of {name}, which has no row"
                continue
            if name == "scale" and not present:
                continue
            error = rms(found[name].double() - wanted[name])
            assert error <= bound, f"{seed} {name}: error {error:.3g}, at most {bound:.3g} allowed"
        base = F.linear(problem.x, problem.weight, problem.bias)
        (dx,) = torch.autograd.grad(base, problem.x, problem.dy)
        rows = problem.ids == -1
        assert equal(found["y"][rows], base[rows]) and equal(found["x"][rows], dx[rows])


def others_replaced(problem: Grouped, place: int, seed: int) -> Grouped:
    """The same call, where rows of all other adapters have something else: the base, or adapters
    of other ranks, dtypes and dropout."""
    choice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    name, kept = problem.names[place], list(problem.adapters.values())[place]
    K, N, dtype = problem.x.shape[1], len(problem.weight), problem.x.dtype
    others = {
        f"b{i}": make_adapter(generator, problem.x, N, K, choice, choice.choice(PAIRS[dtype]))
        for i in range(2)
    }
    ids = torch.randint(-1, 3, (len(problem.ids),), generator=generator)
    ids[ids == 1] = -1  # the place of the adapter itself
    ids = torch.where(problem.ids == place, 1, ids)
    b0, b1 = others.items()
    return replace(problem, adapters=dict([b0, (name, kept), b1]), ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_change_no_bit(dtype: torch.dtype) -> None:
    compared = 0
    for seed in SEEDS:
        problem = make_grouped(seed, dtype)
        mixed = problem.results(problem.fused())
        for place, name in enumerate(problem.names):
            rows = problem.ids == place
            if not rows.any():
                continue
            isolated = others_replaced(problem, place, seed)
            if (isolated.ids == 1).all() or rows.all():
                continue  # lora_linear itself
            alone = isolated.results(isolated.fused())
            for value in ("y", "x"):
                assert equal(mixed[value][rows], alone[value][rows]), f"{seed} {name} {value}"
            own = [leaf for leaf in mixed if leaf.startswith(f"{name}.")]
            assert own
            for leaf in own:
                assert equal(mixed[leaf], alone[leaf]), f"{seed} {leaf}"
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_and_strength_zero_are_the_base(dtype: torch.dtype) -> None:
    x, weight = torch.randn(120, 40).to(dtype), torch.randn(70, 40).to(dtype)
    none = LowRank(weight.new_empty(0, 40), weight.new_empty(70, 0), None, 1.0, 0.0)
    some = LowRank(torch.randn(4, 40).to(dtype), torch.randn(70, 4).to(dtype), None, 1.0, 0.0)
    base = F.linear(x, weight)
    plan = lora_ext.batch(["none", "some"], lengths=[70, 50])
    y = lora_ext.lora_linear_grouped(x, weight, None, {"none": none, "some": some}, plan)
    assert equal(y[:70], base[:70]) and not equal(y[70:], base[70:])
    plan = lora_ext.batch(["some", "some"], lengths=[119, 1], scale=[1.0, 0.0])
    y = lora_ext.lora_linear_grouped(x, weight, None, {"some": some}, plan)
    assert equal(y[119:], base[119:]) and not equal(y[:119], base[:119])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_one_adapter_on_all_rows_is_lora_linear(dropout_p: float) -> None:
    problem = make_grouped(3, torch.float32)
    one = problem.adapters["a0"]._replace(dropout_p=dropout_p)
    everywhere = replace(
        problem, adapters={"a0": one}, ids=torch.zeros_like(problem.ids), scale=None
    )
    y = lora_ext.lora_linear(
        problem.x, problem.weight, problem.bias, *one[:3], scaling=one.scaling,
        dropout_p=dropout_p, rng_state=problem.rng_state,
    )  # fmt: skip
    assert equal(everywhere.fused(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["neighbours", "scattered"])
def test_rows_are_those_of_lora_linear_and_of_the_base(rows: str, dtype: torch.dtype) -> None:
    """Vector kernels make the same of a row in any range, so that all but one row of an adapter
    have the bits that they have where it is alone; dropout counts the call's rows. Also in dtypes
    whose products lora_linear makes faster than PyTorch, whose are the rows without adapter."""
    M, K, N = 200, 72, 80
    x, weight = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(N, K).to(dtype)
    A, B, dy = torch.randn(8, K).to(dtype), torch.randn(N, 8).to(dtype), torch.randn(M, N).to(dtype)
    bias = torch.randn(N).to(dtype)
    state = lora_ext.draw_rng_state(x)
    ids = torch.zeros(M, dtype=torch.int64)
    ids[M - 1 if rows == "neighbours" else slice(5, None, 7)] = -1
    plan = lora_ext.batch(["a"], ids=ids)
    adapter = LowRank(A, B, None, 2.0, 0.25)
    y = lora_ext.lora_linear_grouped(x, weight, bias, {"a": adapter}, plan, rng_state=state)
    alone = lora_ext.lora_linear(
        x, weight, bias, A, B, scaling=2.0, dropout_p=0.25, rng_state=state
    )
    base = F.linear(x, weight, bias)
    dx, dx_alone, dx_base = (torch.autograd.grad(out, x, dy)[0] for out in (y, alone, base))
    assert equal(y[ids == 0], alone[ids == 0]) and equal(y[ids < 0], base[ids < 0])
    assert equal(dx[ids == 0], dx_alone[ids == 0]) and equal(dx[ids < 0], dx_base[ids < 0])


def test_keeps_x_once_and_h_of_each_row() -> None:
    problem = make_grouped(5, torch.float32)
    problem = replace(
        problem, adapters={n: a._replace(dropout_p=0.0) for n, a in problem.adapters.items()}
    )
    problem.weight.requires_grad_(False)
    kept = kept_for_backward(lambda: problem.fused())
    given = {leaf.data_ptr() for leaf in problem.leaves().values()}
    floating = [t for t in kept if t.is_floating_point() and t.data_ptr() not in given]
    ranks = [len(one.lora_A) for one in problem.adapters.values()]
    counts = [int((problem.ids == place).sum()) for place in range(len(ranks))]
    sizes = sum(r * count for r, count in zip(ranks, counts, strict=True))
    assert sum(t.numel() for t in floating) <= sizes
    assert sum(t.data_ptr() == problem.x.data_ptr() for t in kept) == 1


def test_2000_adapters() -> None:
    slots, K, N = 2000, 8, 6
    adapters = {
        f"a{i}": LowRank(torch.randn(1 + i % 3, K), torch.randn(N, 1 + i % 3), None, 1.0, 0.0)
        for i in range(slots)
    }
    x, weight = torch.randn(slots, K), torch.randn(N, K)
    plan = lora_ext.batch(list(adapters))
    y = lora_ext.lora_linear_grouped(x, weight, None, adapters, plan)
    wanted = [
        (x[i] @ weight.T + x[i] @ one.lora_A.T @ one.lora_B.T)
        for i, one in enumerate(adapters.values())
    ]
    torch.testing.assert_close(y, torch.stack(wanted))


@pytest.mark.parametrize("seed", range(4))
def test_gradcheck(seed: int) -> None:
    problem = make_grouped(100 + seed, torch.float64)
    width = slice(0, 7)
    adapters = {
        n: a._replace(
            lora_A=a.lora_A.detach()[:3, width].clone().requires_grad_(),
            lora_B=a.lora_B.detach()[width, :3].clone().requires_grad_(),
            lora_bias=None
            if a.lora_bias is None
            else a.lora_bias.detach()[width].clone().requires_grad_(),
        )
        for n, a in list(problem.adapters.items())[:2]
    }
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True) if seed % 2 else None
    ids = torch.randint(-1, len(adapters), (6,))
    ids[:2] = 0
    small = replace(problem, x=x, weight=weight, bias=None, adapters=adapters, ids=ids, scale=scale)
    leaves = [
        leaf for name, leaf in small.leaves().items() if not name.startswith("a1") or 1 in ids
    ]

    def run(*_: torch.Tensor) -> torch.Tensor:
        return small.fused()

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(adapter: torch.dtype) -> None:
    problem = make_grouped(7, torch.float32)
    bf16 = torch.bfloat16
    adapters = {
        n: a._replace(lora_A=a.lora_A.to(adapter), lora_B=a.lora_B.to(adapter), lora_bias=None)
        for n, a in problem.adapters.items()
    }
    problem = replace(problem, adapters=adapters)
    with torch.autocast("cpu", dtype=bf16):
        y = problem.fused()
    assert y.dtype == bf16
    cast = replace(
        problem, x=problem.x.to(bf16), weight=problem.weight.to(bf16),
        bias=None if problem.bias is None else problem.bias.to(bf16),
    )  # fmt: skip
    assert equal(y, cast.fused())


def test_forward_mode_and_vmap() -> None:
    problem = make_grouped(9, torch.float64)
    tangent = torch.randn_like(problem.x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.x.detach(), tangent)
        y = replace(problem, x=dual).fused()
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
        exact = replace(problem, x=dual).plain()
        wanted = torch.autograd.forward_ad.unpack_dual(exact).tangent
    torch.testing.assert_close(found, wanted)

    several = torch.randn(3, *problem.x.shape, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: replace(problem, x=x).fused())(several)
    each = torch.stack([replace(problem, x=x).plain() for x in several])
    torch.testing.assert_close(mapped, each)


def test_low_rank_has_the_defaults_of_lora_linear() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    A, B = torch.randn(2, 8), torch.randn(5, 2)
    plan = lora_ext.batch(["a", "a"])
    y = lora_ext.lora_linear_grouped(x, weight, None, {"a": LowRank(A, B)}, plan)
    assert equal(y, lora_ext.lora_linear(x, weight, None, A, B))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"plan": ["a"]}, "plan: got .*, expected what lora_ext.batch"),
        ({"adapters": None}, "adapters: got None, expected a dict"),
        ({"adapters": {"a": (1, 2)}}, r"adapters\['a'\]: got .*, expected a LowRank"),
        ({"scaling": "2"}, r"adapters\['a'\]: scaling: got '2', expected"),
        ({"lora_B": None}, r"adapters\['a'\]: lora_B: got None, expected a torch.Tensor"),
        ({"lora_bias": 3}, r"adapters\['a'\]: lora_bias: got 3, expected a torch.Tensor"),
        ({"weight": None}, "weight: got None, expected a torch.Tensor"),
        ({"bias": 5}, "bias: got 5, expected a torch.Tensor"),
        ({"rng_state": 3}, "rng_state: got 3, expected a torch.Tensor"),
    ],
)
def test_arguments_of_other_kinds_are_named(given: dict[str, Any], match: str) -> None:
    adapter = LowRank(torch.randn(2, 8), torch.randn(6, 2), None, 1.0, 0.0)
    adapter = adapter._replace(**{n: v for n, v in given.items() if n in LowRank._fields})
    arguments: dict[str, Any] = {
        "weight": torch.randn(6, 8),
        "bias": None,
        "adapters": {"a": adapter},
    }
    arguments |= {"plan": lora_ext.batch(["a", None]), "rng_state": None}
    arguments |= {n: v for n, v in given.items() if n in arguments}
    with pytest.raises(TypeError, match=f"^lora_linear_grouped: {match}"):
        lora_ext.lora_linear_grouped(torch.randn(2, 8), **arguments)
