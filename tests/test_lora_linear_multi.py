"""lora_linear_multi: against float64 and plain PyTorch, against calls of lora_linear bit for bit,
and what it draws, keeps and leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_problems import PAIRS
from multi_problems import Layer, Multi, bounds, make_multi
from problems import kept_for_backward, rms
from torch import Tensor

import lora_ext

SEEDS = range(60)  # of each dtype
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in PAIRS]
F = torch.nn.functional
equal = torch.equal


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    """And there are gradients of the same operands as of separate calls."""
    for seed in SEEDS:
        problem = make_multi(seed, dtype)
        exact = problem.in_double()
        wanted = exact.results(exact.plain())
        found = problem.results(problem.fused())
        assert set(found) == set(problem.results(problem.separate())), seed
        for name, bound in bounds(problem, {name: wanted[name] for name in found}).items():
            error = rms(found[name].double() - wanted[name])
            assert error <= bound, f"{seed} {name}: error {error:.3g}, at most {bound:.3g} allowed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_separate_calls(dtype: torch.dtype) -> None:
    """Bit for bit, but where a rank is 1: its sums are shorter, and then all layers' are."""
    compared = 0
    for seed in SEEDS:
        problem = make_multi(seed, dtype)
        found = problem.results(problem.fused())
        separate = problem.results(problem.separate())
        if any(one.rank == 1 for one in problem.layers):
            continue
        for name in found:
            if name.startswith("y"):
                assert equal(found[name], separate[name]), f"{seed} {name}"
                compared += 1
    assert compared > 60


@pytest.mark.parametrize("dtype", DTYPES[1:])  # float64 has no measure
def test_gradient_of_x_errs_no_more_than_the_sum_of_separate_ones(dtype: torch.dtype) -> None:
    """Over all seeds. Of n errors of a kind the ratio of two root mean squares is off by
    1 / sqrt(n)."""
    squares = {"fused": 0.0, "separate": 0.0}
    count = together = 0
    for seed in SEEDS:
        problem = make_multi(seed, dtype, all_grads=True)
        ranks = [one.rank for one in problem.layers if one.rank]
        together += problem.x.shape[0] > 1 and len(ranks) > 1 and sum(ranks) <= 96
        exact = problem.in_double()
        want = exact.results(exact.plain())["x"]
        for way in squares:
            found = problem.results(getattr(problem, way)())["x"]
            squares[way] += (rms(found.double() - want) / rms(want)) ** 2 * want.numel()
        count += want.numel()
    assert (squares["fused"] / squares["separate"]) ** 0.5 <= 1 + 4 / count**0.5
    assert together >= len(SEEDS) // 3  # and the others are separate calls


def layer(
    K: int, N: int, r: int | None, p: float = 0.0, dtype: torch.dtype = torch.float32
) -> Layer:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).div(shape[-1] ** 0.5).to(dtype).requires_grad_()

    A, B = (None, None) if r is None else (draw(r, K), draw(N, r))
    return Layer(draw(N, K), draw(N), A, B, None, 2.0, p, None, None)


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masks_are_those_of_separate_calls(dtype: torch.dtype, rows: int) -> None:
    """Drawn layer after layer by those with an adapter that drop elements, and no more is."""
    x = torch.randn(rows, 72).to(dtype)
    problem = Multi(
        x,
        [
            layer(72, 40, 8, 0.1, dtype), layer(72, 24, None, 0.1, dtype),
            layer(72, 8, 4, 0.0, dtype), layer(72, 40, 8, 0.5, dtype),
        ],
    )  # fmt: skip
    torch.manual_seed(3)
    fused, after = problem.fused(), torch.rand(3)
    torch.manual_seed(3)
    separate = problem.separate()
    assert equal(after, torch.rand(3))
    for one, other in zip(fused, separate, strict=True):
        assert equal(one, other)
    torch.manual_seed(4)
    others = problem.fused()
    drops = [p.dropout_p > 0.0 and p.lora_A is not None for p in problem.layers]
    assert [not equal(a, b) for a, b in zip(fused, others, strict=True)] == drops


def test_a_layer_without_adapter_is_the_base() -> None:
    x = torch.randn(70, 40, requires_grad=True)
    problem = Multi(x, [layer(40, 24, 8), layer(40, 30, None), layer(40, 16, 8)])
    ys = problem.fused()
    one = problem.layers[1]
    assert equal(ys[1], F.linear(x, one.weight, one.bias))
    alone = Multi(x, [one]).fused()
    assert equal(alone[0], ys[1])
    grads = torch.autograd.grad(ys[1].sum(), [x, one.weight, one.bias])  # type: ignore[list-item]
    base = F.linear(x, one.weight, one.bias)
    wanted = torch.autograd.grad(base.sum(), [x, one.weight, one.bias])  # type: ignore[list-item]
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [(0, 24, 16), (7, 24, 0), (7, 0, 16), (0, 0, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int]) -> None:
    M, K, N = sizes
    for seed in range(2):
        problem = make_multi(seed, torch.float32, all_grads=True)
        layers = [
            replace(layer(max(K, 1), max(N, 1), 4), dy=torch.randn(M, N)),
            replace(layer(max(K, 1), 8, 4, 0.3 * seed), dy=torch.randn(M, 8)),
        ]
        layers = [
            replace(
                one,
                weight=one.weight[: one.dy.shape[1], :K].detach().requires_grad_(),  # type: ignore[union-attr]
                bias=None,
                lora_A=one.lora_A[:, :K].detach().requires_grad_(),  # type: ignore[index]
                lora_B=one.lora_B[: one.dy.shape[1]].detach().requires_grad_(),  # type: ignore[index, union-attr]
                rng_state=torch.tensor([1, 2]),
            )
            for one in layers
        ]
        problem = Multi(torch.randn(M, K, requires_grad=True), layers)
        found = problem.results(problem.fused())
        wanted = problem.results(problem.separate())
        assert set(found) == set(wanted)
        for name, want in wanted.items():
            torch.testing.assert_close(found[name], want)


def test_a_result_that_is_not_used_costs_no_gradients() -> None:
    x = torch.randn(80, 40, requires_grad=True)
    problem = Multi(x, [layer(40, 24, 8), layer(40, 24, 8), layer(40, 24, 8)])
    ys = problem.fused()
    leaves = problem.leaves()
    grads = torch.autograd.grad(ys[1].sum(), list(leaves.values()), allow_unused=True)
    found = {name for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    assert found == {"x", "weight.1", "bias.1", "lora_A.1", "lora_B.1"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_keeps_x_once_and_h_without_dropout(dropout_p: float) -> None:
    x = torch.randn(64, 40, requires_grad=True)
    problem = Multi(x, [layer(40, 24, 8, dropout_p), layer(40, 16, 4, dropout_p)])
    for one in problem.layers:
        one.weight.requires_grad_(False)
    kept = kept_for_backward(lambda: problem.fused())
    operands = {t.data_ptr() for one in problem.layers
                for t in (one.weight, one.lora_A, one.lora_B) if t is not None}  # fmt: skip
    floating = [t for t in kept if t.is_floating_point() and t.data_ptr() not in operands]
    assert sum(t.data_ptr() == x.data_ptr() for t in floating) == 1
    others = [t.numel() for t in floating if t.data_ptr() != x.data_ptr()]
    assert others == ([] if dropout_p else [64 * 8, 64 * 4])


@pytest.mark.parametrize("trained", ["all", "lora_B", "x"])
def test_gradients_are_made_only_where_they_are_asked_for(trained: str) -> None:
    problem = make_multi(5, torch.float32, all_grads=True)
    layers = [layer(40, 24, 8), layer(40, 16, 4, 0.3), layer(40, 8, None)]
    problem = Multi(torch.randn(64, 40, requires_grad=True), layers)
    for name, leaf in problem.leaves().items():
        leaf.requires_grad_(trained == "all" or name.split(".")[0] == trained)
    torch.manual_seed(1)
    fused = problem.fused()
    torch.manual_seed(1)
    separate = problem.separate()
    with torch.no_grad():
        problem = Multi(problem.x, [replace(one, dy=torch.randn_like(y))
                                    for one, y in zip(layers, fused, strict=True)])  # fmt: skip
    found, wanted = problem.results(fused), problem.results(separate)
    assert set(found) == set(wanted)
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want)


def small(seed: int, p: float) -> Multi:
    torch.manual_seed(seed)
    layers = [layer(5, 4, 2, p, torch.float64), layer(5, 3, None, 0.0, torch.float64),
              layer(5, 2, 3, 0.0, torch.float64)]  # fmt: skip
    layers = [
        replace(one, rng_state=torch.tensor([seed, 7]) if one.dropout_p else None) for one in layers
    ]
    return Multi(torch.randn(6, 5, dtype=torch.float64, requires_grad=True), layers)


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["plain", "dropout"])
def test_gradcheck(p: float) -> None:
    problem = small(1, p)
    leaves = list(problem.leaves().values())

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(problem.fused())

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivatives_without_x_are_refused() -> None:
    problem = small(2, 0.0)
    for one in problem.layers:
        one.weight.requires_grad_(False)
        if one.lora_A is not None:
            one.lora_A.requires_grad_(False)
    y, B = problem.fused()[0], problem.layers[0].lora_B
    assert B is not None
    with pytest.raises(RuntimeError, match="lora_linear_multi: double backward: x was not kept"):
        torch.autograd.grad(y.sum(), [problem.x, B], create_graph=True)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_autocast(adapter: torch.dtype, x_dtype: torch.dtype) -> None:
    """As separate calls: the same values and dtypes, and no larger errors."""
    torch.manual_seed(0)
    x = torch.randn(100, 72).to(x_dtype).requires_grad_()
    layers = [
        replace(one, lora_A=one.lora_A.detach().to(adapter).requires_grad_(),  # type: ignore[union-attr]
                lora_B=one.lora_B.detach().to(adapter).requires_grad_(),  # type: ignore[union-attr]
                dy=torch.randn(100, len(one.weight)).bfloat16())
        for one in (layer(72, 40, 8), layer(72, 24, 4), layer(72, 24, 4))
    ]  # fmt: skip
    problem = Multi(x, layers)
    for one in layers:
        one.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Once, not once for each layer
        rows = replace(problem, x=x * 1)
        kept = [one for one in kept_for_backward(rows.fused) if one.shape == x.shape]
        assert [one.dtype for one in kept] == [torch.bfloat16]
        fused, separate = problem.fused(), problem.separate()
    exact = problem.in_double()
    want = exact.results(exact.plain())
    found, others = problem.results(fused), problem.results(separate)
    for name, other in others.items():
        assert found[name].dtype == other.dtype
        if name.startswith("y"):
            assert equal(found[name], other)
        error, separate_error = (rms(t.double() - want[name]) for t in (found[name], other))
        assert error <= separate_error * (1 + 4 / other.numel() ** 0.5), name


def test_forward_mode_and_vmap() -> None:
    problem = small(3, 0.4)
    tangent = torch.randn_like(problem.x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.x.detach(), tangent)
        for fused, plain in zip(
            replace(problem, x=dual).fused(), replace(problem, x=dual).plain(), strict=True
        ):
            found, wanted = (torch.autograd.forward_ad.unpack_dual(y).tangent
                             for y in (fused, plain))  # fmt: skip
            torch.testing.assert_close(found, wanted)
    several = torch.randn(3, *problem.x.shape, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: tuple(replace(problem, x=x).fused()))(several)
    for i, one in enumerate(mapped):
        each = torch.stack([replace(problem, x=x).plain()[i] for x in several])
        torch.testing.assert_close(one, each)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["plain", "dropout"])
def test_compile(dropout_p: float) -> None:
    """As one graph: the eager results and gradients, and masks that differ between layers."""
    torch.manual_seed(0)
    layers = [layer(24, 16, 4, dropout_p), layer(24, 8, None), layer(24, 16, 4, dropout_p)]
    problem = Multi(torch.randn(33, 24, requires_grad=True), layers)
    states = [None if one.lora_A is None else torch.tensor([5, i])
              for i, one in enumerate(problem.layers)]  # fmt: skip
    fixed = [replace(one, rng_state=state, dy=torch.randn(33, len(one.weight)))
             for one, state in zip(problem.layers, states, strict=True)]  # fmt: skip
    problem = Multi(problem.x, fixed)
    compiled = torch.compile(problem.fused, fullgraph=True, backend="aot_eager")
    found, wanted = problem.results(compiled()), problem.results(problem.fused())
    assert set(found) == set(wanted)
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want)
    if dropout_p:
        first = fixed[0]
        twice = Multi(problem.x, [replace(first, rng_state=None)] * 2)
        a, b = torch.compile(twice.fused, fullgraph=True, backend="aot_eager")()
        assert not equal(a, b)


def test_export_and_meta() -> None:
    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.randn(16, 24), torch.randn(8, 24)])
            self.A = torch.nn.ParameterList([torch.randn(4, 24), torch.randn(2, 24)])
            self.B = torch.nn.ParameterList([torch.randn(16, 4), torch.randn(8, 2)])

        def forward(self, x: Tensor) -> list[Tensor]:
            return lora_ext.lora_linear_multi(
                x, list(self.weights), None, list(self.A), list(self.B), scalings=0.5
            )

    model, x = Projections(), torch.randn(5, 24)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    program = torch.export.export(model, (x,), dynamic_shapes=rows)
    for count in (5, 9):
        x = torch.randn(count, 24)
        for got, want in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(got, want)
    sizes = [y.shape for y in model.to("meta")(torch.empty(2, 3, 24, device="meta"))]
    assert sizes == [(2, 3, 16), (2, 3, 8)]


def test_a_scaling_may_be_a_tensor() -> None:
    x = torch.randn(40, 24)
    one, other = layer(24, 16, 4), layer(24, 16, 4)
    operands = [[one.weight, other.weight], None, [one.lora_A, other.lora_A],
                [one.lora_B, other.lora_B]]  # fmt: skip
    numbers = lora_ext.lora_linear_multi(x, *operands, scalings=[0.5, 2.0])  # type: ignore[arg-type]
    tensors = lora_ext.lora_linear_multi(x, *operands, scalings=[torch.tensor(0.5), 2.0])  # type: ignore[arg-type]
    for a, b in zip(numbers, tensors, strict=True):
        assert equal(a, b)


def test_a_net_of_several_layers() -> None:
    """Attention-like layers one after another, trained: gradients of the first ones pass through
    every dx after them."""

    def net(x: Tensor, blocks: list[Multi], way: str) -> Tensor:
        for block in blocks:
            q, k, v = getattr(replace(block, x=x), way)()
            x = x + torch.tanh(q) * torch.sigmoid(k) * v
        return x

    for p in (0.0, 0.2):
        torch.manual_seed(7)
        blocks = []
        for _ in range(4):
            layers = [layer(48, 48, r, p) for r in (8, 4, 16)]
            blocks.append(Multi(torch.empty(0), [
                replace(one, rng_state=torch.tensor([i, 3]) if p else None)
                for i, one in enumerate(layers)]))  # fmt: skip
        x = torch.randn(96, 48, requires_grad=True)
        exact = [Multi(torch.empty(0), b.in_double().layers) for b in blocks]
        leaves = [x, *(t for b in blocks for t in b.leaves().values())]
        doubles = [x.detach().double().requires_grad_(),
                   *(t for b in exact for t in b.leaves().values())]  # fmt: skip
        want = torch.autograd.grad(net(doubles[0], exact, "plain").square().mean(), doubles)
        got = torch.autograd.grad(net(x, blocks, "fused").square().mean(), leaves)
        plain = torch.autograd.grad(net(x, blocks, "plain").square().mean(), leaves)
        for one, other, exactly in zip(got, plain, want, strict=True):
            error, yardstick = rms(one.double() - exactly), rms(other.double() - exactly)
            assert error <= 2 * yardstick, (tuple(one.shape), error / yardstick)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_what_other_devices_run_is_a_call_for_each(dropout_p: float) -> None:
    """The kernel that a device without its own has, on tensors of the CPU: the bits of separate
    calls, and the sum of their gradients of x."""
    torch.manual_seed(0)
    layers = [layer(40, 24, 8, dropout_p), layer(40, 16, None), layer(40, 24, 4, dropout_p)]
    problem = Multi(torch.randn(70, 40, requires_grad=True), [
        replace(one, rng_state=torch.tensor([3, i]) if one.lora_A is not None else None,
                dy=torch.randn(70, len(one.weight)))
        for i, one in enumerate(layers)
    ])  # fmt: skip
    ys = problem.separate()
    each = [torch.autograd.grad(y, problem.x, one.dy, retain_graph=True)[0]
            for y, one in zip(ys, problem.layers, strict=True)]  # fmt: skip
    wanted = problem.results(ys)
    none = torch.empty(0)
    ops = torch.ops.lora_ext

    def listed(name: str) -> list[Tensor]:
        found = [getattr(one, name) for one in problem.layers]
        return [none if one is None else one.detach() for one in found]

    x, (weight, bias, A, B, states, dy) = problem.x.detach(), map(
        listed, ("weight", "bias", "lora_A", "lora_B", "rng_state", "dy")
    )  # fmt: skip
    numbers = ([one.scaling for one in layers], [], [dropout_p, 0.0, dropout_p], states)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)  # type: ignore[attr-defined]
    found, h = ops.lora_linear_multi_fwd.default.redispatch(
        keys, x, weight, bias, A, B, [], *numbers, [1, 0, 1]
    )
    for got, want in zip(found, ys, strict=True):
        assert equal(got, want)
    dx, *grads = ops.lora_linear_multi_bwd.default.redispatch(
        keys, dy, x, h if not dropout_p else [], weight, A, B, *numbers, True, [30, 6, 30]
    )
    assert equal(dx, each[0] + each[1] + each[2])
    names = ("weight", "bias", "lora_A", "lora_B")
    for name, of_layers in zip(names, grads, strict=False):
        for i, got in enumerate(of_layers):
            if f"{name}.{i}" in wanted:
                assert equal(got, wanted[f"{name}.{i}"]), (name, i)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("biases", [None]),
        ("lora_biases", [None] * 3),
        ("rng_states", [None]),
        ("scalings", [1.0]),
        ("dropout_p", [0.0] * 3),
        ("lora_As", [None]),
    ],
    ids=str,
)
def test_lists_of_other_lengths_are_refused(name: str, value: list[float | None]) -> None:
    """Also of None alone; by the names that the call has."""
    x, W = torch.randn(3, 4), [torch.randn(5, 4), torch.randn(2, 4)]
    arguments = {
        "biases": None, "lora_As": [torch.randn(1, 4)] * 2,
        "lora_Bs": [torch.randn(5, 1), torch.randn(2, 1)],
    } | {name: value}  # fmt: skip
    with pytest.raises(ValueError, match=f"lora_linear_multi: {name}: got {len(value)} entries"):
        lora_ext.lora_linear_multi(x, W, **arguments)


def test_no_layers_are_refused_by_the_name_of_the_argument() -> None:
    with pytest.raises(ValueError, match="lora_linear_multi: weights: got no layers"):
        lora_ext.lora_linear_multi(torch.randn(3, 4), [], None, [], [])
