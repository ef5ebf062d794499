"""lora_mlp: against float64 and against its layers one by one; what it draws, keeps and refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_problems import PAIRS
from mlp_problems import ACTIVATIONS, PARTS, Mlp, bounds, make_mlp, trained
from problems import UNIT, kept_for_backward, rms
from torch import Tensor

import lora_ext

SEEDS = range(40)  # of each dtype
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in PAIRS]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    """And there are gradients of the same operands as of separate calls; also where what gate and
    up made is made again."""
    torch.manual_seed(0)
    for seed in SEEDS:
        problem = make_mlp(seed, dtype)
        wanted = problem.in_double().results("plain")
        found, again = problem.results("fused"), problem.results("recomputed")
        assert set(found) == set(again) == set(problem.results("separate")), seed
        for name, bound in bounds(problem, {name: wanted[name] for name in found}).items():
            for results in (found, again):
                error = rms(results[name].double() - wanted[name])
                assert error <= bound, f"{seed} {name}: {error:.3g}, at most {bound:.3g} allowed"


@pytest.mark.parametrize("dtype", DTYPES[1:])  # float64 has no measure
def test_errs_no_more_than_layers_one_by_one(dtype: torch.dtype) -> None:
    """Over all seeds. Of n errors of a kind the ratio of two root mean squares is off by
    1 / sqrt(n); of a gradient of a parameter no more are independent than M of a row."""
    squares: dict[str, dict[str, float]] = {"fused": {}, "separate": {}}
    counts: dict[str, float] = {}
    for seed in SEEDS:
        problem = make_mlp(seed, dtype)
        rows = problem.dy.numel() // problem.dy.shape[-1]
        wanted = problem.in_double().results("plain")
        for way, sums in squares.items():
            for name, found in problem.results(way).items():
                kind, want = name.partition(".")[0], wanted[name]
                independent = want.numel() * min(1.0, rows / max(want.shape))
                error = rms(found.double() - want) / max(rms(want), 1e-30)
                sums[kind] = sums.get(kind, 0.0) + error**2 * independent
                if way == "fused":
                    counts[kind] = counts.get(kind, 0.0) + independent
    for kind, count in counts.items():
        ratio = (squares["fused"][kind] / squares["separate"][kind]) ** 0.5
        assert ratio <= 1 + 4 / count**0.5, f"{kind}: {ratio}, of {count:.0f} errors"


# f(e) = e sigmoid(u): of the double's own tanh nothing is left where it is nearly -1.
ARGUMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda e: e,
    "gelu_tanh": lambda e: (8 / torch.pi) ** 0.5 * (e + 0.044715 * e**3),
}


@pytest.mark.parametrize("activation", ARGUMENT)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_activations_within_their_rounding(dtype: torch.dtype, activation: str) -> None:
    """Of every size of number, in units of its terms: four for f (two of the exponential, a sum, a
    quotient) and twice as many for its slope, or PyTorch's own error. GELU's argument of the
    exponential is rounded four times, which errs by as much as it is."""
    e = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-37, 4.5, 500)])
    e = torch.cat([e, -e]).to(dtype).unsqueeze(1).requires_grad_()
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    biases, none = [None, one[0], None], [None] * 3  # so that g is 1
    found = lora_ext.lora_mlp(e, [one, zero, one], biases, none, none, activation=activation)  # type: ignore[arg-type]
    theirs = ACTIVATIONS[activation](e)
    wide = e.detach().double().requires_grad_()
    u = ARGUMENT[activation](wide)
    want = wide * u.sigmoid()
    slopes = [torch.autograd.grad(y.sum(), of)[0] for y, of in ((found, e), (theirs, e))]
    (slope,) = torch.autograd.grad(want.sum(), wide)
    rounded = 0.0 if activation == "silu" else 4 * u.detach().abs() * (dtype == torch.float32)
    of_slope = u.detach().sigmoid() + (slope - u.detach().sigmoid()).abs()
    for (ours, other), exact, terms, units in (
        ((found, theirs), want.detach(), want.detach().abs(), 4),
        (slopes, slope, of_slope, 8),
    ):
        unit = UNIT[dtype] * terms.clamp(min=torch.finfo(dtype).tiny)  # the smallest normal number
        error, another = ((t.detach().double() - exact).abs() / unit for t in (ours, other))
        assert (error <= another.clamp(min=units + rounded)).all(), (error - another).max()


def test_not_finite_numbers_are_pytorchs() -> None:
    e = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30]).unsqueeze(1)
    ones = [torch.ones(1, 1)] * 3
    for activation, f in ACTIVATIONS.items():
        found = lora_ext.lora_mlp(e, ones, None, [None] * 3, [None] * 3, activation=activation)  # type: ignore[arg-type]
        torch.testing.assert_close(found, f(e) * e, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masks_are_those_of_separate_calls(dtype: torch.dtype) -> None:
    """Drawn by gate, up and down in this order where they drop elements, and no more is."""
    problem = make_mlp(3, dtype, (64, 72, 40, 24), "relu")
    assert len(problem.layers) == 3
    layers = [
        replace(
            one,
            lora_A=torch.randn(4, one.weight.shape[1], dtype=dtype),
            lora_B=torch.randn(one.weight.shape[0], 4, dtype=dtype),
            dropout_p=p,
            rng_state=None,
            lora_bias=None,
        )
        for one, p in zip(problem.layers, (0.1, 0.0, 0.5), strict=True)
    ]
    problem = replace(problem, layers=layers)
    torch.manual_seed(3)
    fused, after = problem.fused(), torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(fused, problem.separate())  # relu and the product round as PyTorch's
    assert torch.equal(after, torch.rand(3))


def kept_bytes(problem: Mlp, way: str) -> int:
    """Of what is not a parameter, once each."""
    parameters = {getattr(one, name) for one in problem.layers for name in PARTS}
    kept = {
        one.data_ptr(): one.numel() * one.element_size()
        for one in kept_for_backward(getattr(problem, way))
        if one not in parameters and one.dtype != torch.int64
    }
    return sum(kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_for_backward(p: float) -> None:
    """x and what gate and up made, and without dropout h of each; or x alone."""
    M, K, inner = 50, 64, 256
    problem = trained(torch.bfloat16, p, (M, K, inner, 64))
    h = 0 if p else 3 * M * 4 * 4  # float32, of rank 4
    assert kept_bytes(problem, "fused") == 2 * M * (K + 2 * inner) + h
    assert kept_bytes(problem, "recomputed") == 2 * M * K
    # F.silu keeps e, the product its two factors, and down the product.
    assert kept_bytes(problem, "separate") == 2 * M * (K + 4 * inner) + h


def test_where_down_alone_trains_what_it_reads_is_kept() -> None:
    problem = trained(torch.float32, 0.0, (50, 64, 256, 32))
    *entries, down = problem.layers
    frozen = [replace(one, lora_A=None, lora_B=None) for one in entries]
    problem = replace(problem, x=problem.x.detach(), layers=[*frozen, down])
    assert kept_bytes(problem, "fused") == 4 * 50 * (256 + 4)
    assert set(problem.results("fused")) == {"y", "lora_A.2", "lora_B.2"}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_twice_differentiable(activation: str, p: float) -> None:
    problem = replace(trained(torch.float64, p, (3, 4, 5, 3)), activation=activation)
    leaves = list(problem.leaves().values())
    assert torch.autograd.gradcheck(lambda *_: problem.fused(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: problem.fused(), leaves)
    both = replace(
        problem,
        layers=[
            replace(
                problem.layers[0],
                weight=torch.randn(10, 4, dtype=torch.float64),
                lora_B=torch.randn(10, 4, dtype=torch.float64, requires_grad=True),
            ),
            problem.layers[2],
        ],
    )
    assert torch.autograd.gradgradcheck(lambda *_: both.fused(), list(both.leaves().values()))


def test_x_that_was_not_kept_is_told_where_it_is_differentiated_twice() -> None:
    problem = trained(torch.float32, 0.0, (3, 4, 5, 3))
    entries = [
        replace(one, lora_A=None, lora_B=None, weight=one.weight) for one in problem.layers[:2]
    ]
    problem = replace(problem, layers=[*entries, problem.layers[2]])
    (dx,) = torch.autograd.grad(problem.fused().sum(), problem.x)  # once it goes
    with pytest.raises(RuntimeError, match="lora_mlp: double backward: x was not kept"):
        torch.autograd.grad(problem.fused().sum(), problem.x, create_graph=True)
    wanted = torch.autograd.grad(problem.separate().sum(), problem.x)
    torch.testing.assert_close(dx, *wanted)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["fused", "recomputed"])
def test_autocast(x_dtype: torch.dtype, way: str) -> None:
    """dtypes as of layers one by one, and the gradient of x as exact; less is kept."""
    leaf = trained(torch.float32, 0.1, (400, 32, 48, 24))
    leaf = replace(leaf, x=leaf.x.detach().to(x_dtype).requires_grad_())
    wanted = leaf.in_double().results("plain")
    results: dict[str, dict[str, Tensor]] = {}
    for each in (way, "separate"):
        problem = replace(leaf, x=leaf.x * 1)  # no leaf: autocast keeps no cast of it
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(problem, each)()
        assert y.dtype == torch.bfloat16
        leaves = leaf.leaves()
        gradients = torch.autograd.grad(y, list(leaves.values()), leaf.dy.bfloat16())
        results[each] = {"y": y, **dict(zip(leaves, gradients, strict=True))}
    for name, other in results["separate"].items():
        found = results[way][name]
        assert found.dtype == other.dtype
        errors = [rms(one.double() - wanted[name]) for one in (found, other)]
        # Both round e, g and their product, in other places, and dy once.
        assert errors[0] <= errors[1] * (1 + 4 / found.numel() ** 0.5), name
    with torch.autocast("cpu", torch.bfloat16):
        problem = replace(leaf, x=leaf.x * 1)
        kept = {each: kept_bytes(problem, each) for each in (way, "separate")}
    x, inner = 400 * 32 * 2, 400 * 48 * 2
    entries = 2 if x_dtype == torch.float32 else 1  # each of which casts x
    weights = 2 * sum(one.weight.numel() for one in leaf.layers)  # cast, too
    assert kept["separate"] == weights + entries * x + 4 * inner
    assert kept[way] == weights + (x + 2 * inner if way == "fused" else x)


@pytest.mark.parametrize("way", ["fused", "recomputed"])
def test_twice_differentiable_under_autocast(way: str) -> None:
    """Through the x that is cast inside."""
    found: list[list[Tensor]] = []
    for each in (way, "separate"):
        torch.manual_seed(0)
        problem = trained(torch.float32, 0.1, (40, 32, 48, 24))
        leaves = list(problem.leaves().values())
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(problem, each)()
        first = torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True)
        found.append([*torch.autograd.grad(sum(one.square().sum() for one in first), leaves)])
    for one, other in zip(*found, strict=True):
        # Some twenty roundings follow one another
        assert rms(one - other) <= 20 * UNIT[torch.bfloat16] * rms(other)


@pytest.mark.parametrize("sizes", [(0, 8, 6, 4), (5, 8, 6, 0), (5, 8, 0, 4), (5, 0, 6, 4)], ids=str)
def test_empty(sizes: tuple[int, int, int, int]) -> None:
    problem = trained(torch.float32, 0.0, sizes)
    found, wanted = problem.results("fused"), problem.results("separate")
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want)


def test_compiled() -> None:
    problem = trained(torch.float32, 0.1, (40, 32, 48, 24))
    states = [one.rng_state for one in problem.layers]

    def step(x: Tensor) -> Tensor:
        lists: Any = [[getattr(one, name) for one in problem.layers] for name in PARTS]
        return lora_ext.lora_mlp(x, *lists, scalings=0.5, dropout_p=0.1, rng_states=states)

    wanted = step(problem.x)
    gradient = torch.autograd.grad(wanted.sum(), problem.x)
    found = torch.compile(step, fullgraph=True)(problem.x)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), problem.x)[0], gradient[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "swish"}, "activation: got 'swish', expected 'silu'"),
    "width": ({"weights": [torch.ones(6, 4)] * 2 + [torch.ones(3, 5)]}, "gate: weight: got shape"),
    "up": (
        {"weights": [torch.ones(5, 4), torch.ones(6, 4), torch.ones(3, 5)]},
        "up: weight: got shape .*down has 5",
    ),
    "count": ({"weights": [torch.ones(5, 4)]}, "got 1 entries|expected"),
    "rank": ({"lora_As": [torch.ones(2, 7), None, None]}, "lora_mlp: gate: lora_"),
    "kind": ({"recompute": "yes"}, "recompute: got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.ones(5, 4), torch.ones(5, 4), torch.ones(3, 5)],
        "biases": None,
        "lora_As": [torch.ones(2, 4), None, None],
        "lora_Bs": [torch.ones(5, 2), None, None],
    }
    changed, message = REFUSED[case]
    assert lora_ext.lora_mlp(torch.ones(2, 4), **arguments).shape == (2, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        lora_ext.lora_mlp(torch.ones(2, 4), **{**arguments, **changed})


def test_qkv_are_three_layers_of_one_x() -> None:
    x, widths = torch.randn(7, 12, requires_grad=True), (16, 8, 8)
    weights = [torch.randn(n, 12) for n in widths]
    A, B = (
        [torch.randn(2, 12), None, torch.randn(2, 12)],
        [torch.randn(16, 2), None, torch.ones(8, 2)],
    )
    found = lora_ext.lora_qkv(x, weights, None, A, B, scalings=0.5)
    wanted = lora_ext.lora_linear_multi(x, weights, None, A, B, scalings=0.5)
    assert [y.shape for y in found] == [(7, n) for n in widths]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="lora_qkv: weights: got 2 entries, expected 3"):
        lora_ext.lora_qkv(x, weights[:2], None, A[:2], B[:2])


@pytest.mark.parametrize(
    ("A", "B", "weight", "message"),
    [
        (torch.ones(2, 12), None, torch.ones(8, 12), "v: lora_B: got none"),
        (torch.ones(2, 11), torch.ones(8, 2), torch.ones(8, 12), "v: lora_A: got shape"),
        (None, None, torch.ones(8), "v: weight: got shape"),
    ],
)
def test_wrong_layers_have_the_names_of_the_operator(
    A: Tensor | None, B: Tensor | None, weight: Tensor, message: str
) -> None:
    x, others = torch.ones(7, 12), [torch.ones(16, 12), torch.ones(8, 12)]
    with pytest.raises(ValueError, match=f"^lora_qkv: {message}"):
        lora_ext.lora_qkv(x, [*others, weight], None, [None, None, A], [None, None, B])
    if A is not None:
        square = [torch.ones(12, 12), torch.ones(12, 12), torch.ones(8, 12)]
        with pytest.raises(ValueError, match=f"^lora_mlp: {message.replace('v:', 'down:')}"):
            lora_ext.lora_mlp(x, square, None, [None, None, A], [None, None, B])
    with pytest.raises(ValueError, match=r"^lora_qkv: x: got a 0-d tensor"):
        lora_ext.lora_qkv(torch.ones(()), [*others, others[1]], None, [None] * 3, [None] * 3)
