"""Several adapters for each row, with gates: `lora_ext.batch(..., gates=...)`, against float64, and
bit for bit where gates say that there is one adapter."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from grouped_problems import PAIRS, bounds, make_adapter, make_gated, make_grouped
from problems import rms
from torch import nn

import lora_ext
from lora_ext.functional import LowRank

SEEDS = range(60)  # of each dtype
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in PAIRS]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    for seed in SEEDS:
        problem = make_gated(seed, dtype)
        exact = problem.in_double()
        wanted = exact.results(exact.plain())
        found = problem.results(problem.fused())
        present = {f"a{i}" for i in problem.ids.unique().tolist() if i >= 0}
        for name, bound in bounds(problem, wanted).items():
            if name.startswith("a") and name.split(".")[0] not in present:
                assert name not in found, f"{seed}: a gradient of {name}, which has no row"
                continue
            if name in ("scale", "gates") and not present:
                continue
            error = rms(found[name].double() - wanted[name])
            assert error <= bound, f"{seed} {name}: error {error:.3g}, at most {bound:.3g} allowed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_adapters_change_no_bit(dtype: torch.dtype) -> None:
    """Of rows that have one adapter alone, and of its gradients; nor do gates of other adapters."""
    compared = 0
    for seed in SEEDS:
        problem = make_gated(seed, dtype)
        mixed = problem.results(problem.fused())
        own = problem.ids == 0
        alone = replace(problem, ids=torch.where(own, 0, -1))
        found = alone.results(alone.fused()) if own.any() else {}
        rows = own.any(1) & ((problem.ids >= 0).sum(1) == 1)
        for name in ("y", "x"):
            if found:
                assert torch.equal(mixed[name][rows], found[name][rows]), f"{seed} {name}"
        for name in [name for name in found if name.startswith("a0.")]:
            assert torch.equal(mixed[name], found[name]), f"{seed} {name}"
            compared += 1
        if "gates" in found:
            assert torch.equal(mixed["gates"][own], found["gates"][own]), seed
    assert compared > 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_other_adapters_are_changes_no_gradient(dtype: torch.dtype) -> None:
    """Of an adapter whose rows have the others before it that they had: of other ranks, dropout and
    dtypes."""
    compared = 0
    for seed in SEEDS:
        problem = make_gated(seed, dtype)
        mixed = problem.results(problem.fused())
        choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        others = {
            name: make_adapter(
                generator, problem.x, problem.dy.shape[1], problem.x.shape[1], choice,
                choice.choice(PAIRS[dtype]),
            )
            for name in problem.names
        }  # fmt: skip
        for name, own in problem.adapters.items():
            found = replace(problem, adapters={**others, name: own})
            for leaf, value in found.results(found.fused()).items():
                if leaf.startswith(f"{name}."):
                    assert torch.equal(value, mixed[leaf]), f"{seed} {leaf}"
                    compared += 1
    assert compared > 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_gates_are_that_adapter(dtype: torch.dtype) -> None:
    """Bit for bit where the same kernels run, as of so many rows: the others add zeros."""
    for seed in SEEDS:
        problem = make_grouped(seed, dtype)
        if len(problem.x) < 97:
            continue
        plain = {n: one._replace(lora_bias=None) for n, one in problem.adapters.items()}
        problem = replace(problem, adapters=plain)
        slots = len(problem.adapters)
        hot = torch.nn.functional.one_hot(problem.ids + 1, slots + 1)[:, 1:].float()
        gated = lora_ext.lora_linear_grouped(
            problem.x, problem.weight, problem.bias, problem.adapters,
            lora_ext.batch(problem.names, gates=hot), rng_state=problem.rng_state,
        )  # fmt: skip
        ones = lora_ext.batch(
            problem.names, ids=problem.ids[:, None], gates=torch.ones(len(problem.x), 1)
        )
        wanted = lora_ext.lora_linear_grouped(
            problem.x, problem.weight, problem.bias, problem.adapters, ones,
            rng_state=problem.rng_state,
        )  # fmt: skip
        counts = torch.bincount(problem.ids + 1, minlength=slots + 1)
        many = (counts > 2)[problem.ids + 1]  # single rows are multiplied in another order
        assert torch.equal(gated[many], wanted[many]), seed


def test_gradcheck() -> None:
    problem = make_gated(4, torch.float64)
    width = slice(0, 5)
    adapters = {
        n: a._replace(
            lora_A=a.lora_A.detach()[:2, width].clone().requires_grad_(),
            lora_B=a.lora_B.detach()[width, :2].clone().requires_grad_(),
            lora_bias=None,
        )
        for n, a in list(problem.adapters.items())[:3]
    }
    x, weight = (torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gates = torch.randn(5, len(adapters), dtype=torch.float64, requires_grad=True)
    ids = torch.arange(len(adapters)).expand(5, -1)
    small = replace(
        problem, x=x, weight=weight, bias=None, adapters=adapters, ids=ids, gates=gates, scale=None
    )
    leaves = list(small.leaves().values())
    assert torch.autograd.gradcheck(lambda *_: small.fused(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: small.fused(), leaves)


def two_layers() -> nn.Sequential:
    layers = [lora_ext.nn.Linear(6, 8), lora_ext.nn.Linear(8, 5)]
    for name, r in (("a", 2), ("b", 4), ("c", 1)):
        for layer in layers:
            layer.add_adapter(name, r=r, init_lora_weights=False)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def test_gates_of_requests_hold_for_their_rows_and_for_all_layers() -> None:
    net, x = two_layers().double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gates = torch.tensor([[0.5, 0.25, 0.0], [0.0, -1.0, 2.0]]).double().requires_grad_()
    with lora_ext.batch(["a", "b", "c"], gates=gates):
        y = net(x)
    (found,) = torch.autograd.grad(y.square().sum(), gates)

    def by_hand(gates: torch.Tensor) -> torch.Tensor:
        value = x
        for layer in (net[0], net[2]):
            base = nn.functional.linear(value, layer.weight, layer.bias)
            updates = [value @ layer.get_delta_weight(name).T for name in "abc"]
            mixed = sum(g[:, None, None] * u for g, u in zip(gates.T, updates, strict=True))
            value = base + mixed
            value = value.tanh() if layer is net[0] else value
        return value

    again = gates.detach().clone().requires_grad_()
    wanted = by_hand(again)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), again)[0])
    rows = gates.detach()[:, None].expand(2, 3, 3)
    with lora_ext.batch(["a", "b", "c"], gates=rows):
        assert torch.equal(net(x), y)


@pytest.mark.parametrize("kind", ["embedding", "conv"])
def test_composed_layers_mix_too(kind: str) -> None:
    if kind == "embedding":
        layer = lora_ext.nn.Embedding(10, 6)
        x = torch.randint(0, 10, (2, 4))
    else:
        layer = lora_ext.nn.Conv1d(3, 6, 3, padding=1)
        x = torch.randn(2, 3, 4)
    for name, r in (("a", 2), ("b", 3)):
        layer.add_adapter(name, r=r, init_lora_weights=False)
    gates = torch.tensor([[0.5, -2.0], [1.5, 0.0]])
    with lora_ext.batch(["a", "b"], gates=gates):
        y = layer(x)
    layer.set_adapter([])
    wanted = layer(x)
    base = wanted.clone()
    for place, name in enumerate("ab"):
        layer.set_adapter(name)
        wanted = wanted + gates[:, place].view(2, 1, 1) * (layer(x) - base)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gates", "scale", "both"])
def test_a_checkpoint_runs_again_under_its_plan(kind: str, reentrant: bool) -> None:
    """In a backward outside of the `with`; gates and strengths get their gradients."""
    net, x = two_layers(), torch.randn(2, 3, 6)
    strengths = {
        name: torch.randn(shape, requires_grad=True)
        for name, shape in {"gates": (2, 3), "scale": (2,)}.items()
        if kind in (name, "both")
    }
    names = ["a", "c"] if kind == "scale" else ["a", "b", "c"]
    checkpoint = lora_ext.batching.Checkpointing(torch.utils.checkpoint.checkpoint)
    found = []
    for checkpointed in (False, True):
        arguments = {name: 2.0 * one for name, one in strengths.items()}
        with lora_ext.batch(names, **arguments):  # type: ignore[arg-type]
            y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        y.square().sum().backward()
        found.append([one.grad for one in strengths.values()])
        for one in strengths.values():
            one.grad = None
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "no tensor": ("gates: got", lambda: lora_ext.batch(["a"], gates=[1.0])),  # type: ignore[arg-type]
    "integers": ("gates: got", lambda: lora_ext.batch(["a"], gates=torch.ones(1, 1).long())),
    "other adapters": ("gates: got shape", lambda: lora_ext.batch(["a"], gates=torch.ones(1, 2))),
    "not those of ids": (
        "gates: got",
        lambda: lora_ext.batch(["a"], ids=torch.zeros(3, 1).long(), gates=torch.ones(2, 1)),
    ),
    "twice": (
        "the same adapter twice",
        lambda: lora_ext.batch(["a"], ids=torch.zeros(1, 2).long(), gates=torch.ones(1, 2)),
    ),
    "a name twice": ("each name once", lambda: lora_ext.batch(["a", "a"], gates=torch.ones(1, 2))),
    "lengths": ("lengths", lambda: lora_ext.batch(["a"], lengths=[1], gates=torch.ones(1, 1))),
    "after": (
        "after",
        lambda: lora_ext.batch(["a"], after=[1], gates=torch.ones(1, 2, 1)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    what, call = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=what):
        call()


def test_a_row_twice_in_an_adapter_is_refused() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    one = LowRank(torch.randn(2, 4), torch.randn(5, 2), None, 1.0, 0.0)

    def run(order: list[int], counts: list[int], rounds: list[int]) -> torch.Tensor:
        slots = len(counts)
        return torch.ops.lora_ext.lora_linear_grouped(  # type: ignore[no-any-return]
            x, weight, None, [one.lora_A] * slots, [one.lora_B] * slots, [],
            torch.tensor(order, dtype=torch.int32), counts, None, [1.0] * slots, [0.0] * slots,
            None, rounds,
        )  # fmt: skip

    for rounds in ([], [0, 2], [0, 1, 1, 1]):
        with pytest.raises(ValueError, match="row 1 twice in one slot, expected it once"):
            run([1, 1], [2], rounds)
    with pytest.raises(ValueError, match="row 1 twice, expected one slot for each row, or rounds"):
        run([1, 1], [1, 1], [])
    for rounds in ([0, 1, 0, 1], [5, 1, 4, 1]):
        last, number = rounds[0], rounds[2]
        told = f"in round {number} of slot 1, expected one after {last}, in which slot 0 has it"
        with pytest.raises(ValueError, match=told):
            run([1, 1], [1, 1], rounds)
    both = run([1, 1], [1, 1], [0, 1, 7, 1])
    torch.testing.assert_close(both[1], (x @ weight.T + 2 * x @ one.lora_A.T @ one.lora_B.T)[1])


@pytest.mark.parametrize(
    ("rounds", "what"),
    [
        ([0, 3, 1], r"got 3 numbers, with 2 rows of slot 1 left, expected pairs"),
        ([0, 3], r"got 2 numbers, with 2 rows of slot 1 left, expected pairs"),
        ([0, 3, 1, 2, 2, 1], r"got 6 numbers, .* add up to counts, as the first 4 do"),
        ([0, 3, 1, 2, 2], r"got 5 numbers, .* add up to counts, as the first 4 do"),
        ([0, 4, 1, 1], r"got \(0, 4\) in slot 0 after round -1, with 3 rows left"),
        ([0, 3, 1, 3], r"got \(1, 3\) in slot 1 after round -1, with 2 rows left"),
        ([0, 2, 0, 1, 1, 2], r"got \(0, 1\) in slot 0 after round 0, with 1 rows left"),
        ([-1, 3, 0, 2], r"got \(-1, 3\) in slot 0 after round -1"),
        ([0, 0, 1, 3, 0, 2], r"got \(0, 0\) in slot 0"),
    ],
)
def test_rounds_that_do_not_divide_the_rows_are_refused(rounds: list[int], what: str) -> None:
    x, weight, A, B = torch.randn(9, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    slots = [[A, A], [B, B], [], torch.arange(5, dtype=torch.int32), [3, 2], None]
    with pytest.raises(ValueError, match=f"lora_linear_grouped: rounds: {what}"):
        torch.ops.lora_ext.lora_linear_grouped_fwd(
            x, weight, None, *slots, [1.0, 1.0], [0.0, 0.0], None, rounds
        )


@pytest.mark.parametrize("kind", ["sparse", "all", "one each", "none"])
def test_a_plan_tells_the_rounds(kind: str) -> None:
    """Which of a row's adapters one is: as pairs (round, rows) for each name."""
    ids = {
        "sparse": torch.tensor([[2, 0], [-1, 2], [1, 2], [1, -1], [0, 1]]),
        "all": torch.arange(3).expand(4, -1),
        "one each": torch.tensor([[2, -1], [-1, 0], [-1, -1]]),
        "none": torch.full((3, 2), -1),
    }[kind]
    names = ["a", "b", "c"]
    plan = lora_ext.batch(names, ids=ids, gates=torch.ones(ids.shape))
    found = plan.assign((len(ids),), torch.device("cpu"), names, "here")
    assert found.rounds == {
        "sparse": (0, 2, 0, 2, 1, 1, 0, 1, 1, 2), "all": (0, 4, 1, 4, 2, 4),
        "one each": (), "none": (),
    }[kind]  # fmt: skip
    if kind == "sparse":
        assert found.order.tolist() == [0, 4, 2, 3, 4, 1, 0, 2]
        assert found.names == ("a", "b", "c") and found.counts == (2, 3, 3)


def test_gates_of_the_base_are_not_followed() -> None:
    """It has no update that they could multiply."""
    layer = lora_ext.nn.Linear(16, 8, r=4, init_lora_weights=False)
    x = torch.randn(2, 3, 16)
    gates = torch.tensor([[0.5, 3.0], [2.0, -1.0]], requires_grad=True)
    with lora_ext.batch(["default", None], gates=gates):
        y = layer(x)
    y.square().sum().backward()
    with lora_ext.batch(["default"], gates=gates[:, :1]):
        torch.testing.assert_close(y, layer(x))
    assert gates.grad is not None and (gates.grad != 0).tolist() == [[True, False]] * 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_strengths_that_are_not_finite_are_refused(number: float) -> None:
    """As numbers; a tensor is not looked into."""
    with pytest.raises(ValueError, match=f"batch: scale: got {number}, expected finite numbers"):
        lora_ext.batch(["a", "b"], scale=[0.5, number])
    lora_ext.batch(["a", "b"], scale=torch.tensor([0.5, number]))
