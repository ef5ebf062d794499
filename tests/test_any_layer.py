"""lora_ext.nn.AnyLayer against functional_call with W + delta W in place of W."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ext.nn import AnyLayer, Linear

RANK = 2


class Experts(nn.Module):
    """A module of our own, with a matrix, a stack of matrices, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 5))
        self.stack = nn.Parameter(torch.randn(4, 3, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor, *, power: int = 1) -> Tensor:
        gates = (self.norm(x) @ self.mix.t()).softmax(-1)
        return torch.einsum("be,eoi,bi->bo", gates, self.stack, x * self.scale) ** power


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[tuple[int, ...]]]] = {
    "GRU": (
        lambda: nn.GRU(5, 4, 2, bidirectional=True),
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1_reverse"],
        [(6, 3, 5)],
    ),
    "LSTM": (lambda: nn.LSTM(5, 4, proj_size=3), ["weight_hh_l0", "weight_hr_l0"], [(6, 5)]),
    "RNN": (lambda: nn.RNN(5, 4, batch_first=True), ["weight_ih_l0"], [(2, 6, 5), (1, 2, 4)]),
    "GRUCell": (lambda: nn.GRUCell(5, 4), ["weight_ih", "weight_hh"], [(3, 5), (3, 4)]),
    "Bilinear": (lambda: nn.Bilinear(5, 4, 3), ["weight"], [(2, 6, 5), (2, 6, 4)]),
    "own": (Experts, ["mix", "stack"], [(6, 5)]),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
Case = tuple[Callable[[], nn.Module], list[str], list[tuple[int, ...]]]


def layer_of(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> AnyLayer:
    torch.manual_seed(0)
    make, weights, _ = case
    options = {"init_lora_weights": False, **options}
    return AnyLayer.from_module(make().to(dtype), weights, RANK, 3, **options)


def expected(layer: AnyLayer, weights: list[str], *args: Tensor, **kw: Any) -> Any:
    """Differentiable in the parameters of `layer`."""
    given = {n: p for n, p in layer.named_parameters() if "lora" not in n}
    for name in weights:
        weight = given[name]
        for adapter in layer.active_adapters:
            end = "" if adapter == "default" else f"_{adapter}"
            A, B = (getattr(layer, f"{name}_lora_{part}{end}") for part in "AB")
            given[name] = given[name] + layer.get_scale(adapter) * (B @ A).reshape(weight.shape)
    return torch.func.functional_call(copy.deepcopy(layer.get_base_layer()), given, args, kw)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for r in results for t in flat(r)]


def assert_same(layer: AnyLayer, case: Case, tolerance: float = 1e-12, **kw: Any) -> None:
    """Results and all gradients."""
    _, weights, shapes = case
    args = [normal(*shape).requires_grad_() for shape in shapes]
    ours, theirs = flat(layer(*args, **kw)), flat(expected(layer, weights, *args, **kw))
    leaves = [*args, *layer.parameters()]
    dys = [normal(*t.shape) for t in ours]
    gradients = [
        torch.autograd.grad(result, leaves, dys, materialize_grads=True)
        for result in (ours, theirs)
    ]
    for mine, other in zip([*ours, *gradients[0]], [*theirs, *gradients[1]], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@each_case
def test_values_and_gradients_are_those_of_the_formula(case: Case) -> None:
    layer = layer_of(case)
    assert_same(layer, case)
    assert_same(layer.eval(), case)
    base = [n for n, p in layer.named_parameters() if "lora" not in n]
    layer.requires_grad_(False)
    for parameter in layer.adapter_parameters("default").values():
        parameter.requires_grad_(True)
    flat(layer(*(normal(*shape) for shape in case[2])))[0].sum().backward()
    gradients = {n for n, p in layer.named_parameters() if p.grad is not None}
    assert gradients == {n for n, _ in layer.named_parameters()} - set(base)


def test_keyword_arguments_and_hooks_reach_the_base() -> None:
    layer, calls = layer_of(CASES["own"]), []
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.norm.register_forward_hook(lambda *_: calls.append("child"))
    layer(normal(6, 5), power=2)
    assert calls == ["child", "layer"]
    assert_same(layer, CASES["own"], power=2)


def test_packed_sequences() -> None:
    layer = layer_of(CASES["GRU"])
    packed = nn.utils.rnn.pack_sequence([normal(6, 5), normal(4, 5)])
    y, truth = layer(packed)[0].data, expected(layer, CASES["GRU"][1], packed)[0].data
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)


@each_case
def test_parameters_stay_over_forward_and_backward(case: Case) -> None:
    make, weights, shapes = case
    torch.manual_seed(0)
    module = make().double()
    names, before = [n for n, _ in module.named_parameters()], list(module.parameters())
    layer = AnyLayer.from_module(module, weights, RANK, 3, init_lora_weights=False)
    bits = {n: p.detach().clone() for n, p in layer.named_parameters()}
    places = {n: p.data_ptr() for n, p in layer.named_parameters()}
    for _ in range(2):
        flat(layer(*(normal(*shape) for shape in shapes)))[0].sum().backward()
        assert [n for n, _ in layer.named_parameters() if "lora" not in n] == names
        now = dict(layer.named_parameters())
        assert all(now[n] is p for n, p in zip(names, before, strict=True))
        assert {n: p.data_ptr() for n, p in now.items()} == places
        assert all(torch.equal(p, bits[n]) for n, p in now.items())
        assert isinstance(layer, type(module)) and isinstance(layer, AnyLayer)


@each_case
def test_without_a_running_adapter_it_is_the_base(case: Case) -> None:
    layer, args = layer_of(case), [normal(*shape) for shape in case[2]]
    truth = flat(layer.get_base_layer()(*args))
    layer.set_scale("default", 0.0)
    assert all(map(torch.equal, flat(layer(*args)), truth))
    layer.delete_adapter("default")
    assert all(map(torch.equal, flat(layer(*args)), truth))


@each_case
def test_several_adapters_add_up(case: Case) -> None:
    layer, args = layer_of(case), [normal(*shape) for shape in case[2]]
    layer.add_adapter("other", r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    assert_same(layer, case)
    y = flat(layer(*args))
    layer.merge()
    for mine, other in zip(flat(layer(*args)), y, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_call_uses_the_weight_that_merging_writes(dtype: torch.dtype) -> None:
    """Also under autocast; the adapters are float32."""
    layer = layer_of(CASES["Bilinear"], dtype)
    args = [normal(*shape, dtype=dtype) for shape in CASES["Bilinear"][2]]
    y, changed = layer(*args), layer._adapted("weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._adapted("weight"), changed)
    layer.merge()
    # Sums in float32 whose order may differ: at most the neighbour, where rounding is undecided.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(changed, layer.weight, rtol=unit, atol=0)
    assert y.dtype == changed.dtype == dtype


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_merges_leave_every_bit(dtype: torch.dtype, case: Case) -> None:
    layer, weights = layer_of(case, dtype), case[1]
    before = {name: getattr(layer, name).detach().clone() for name in weights}
    for _ in range(100):
        layer.reset_lora_parameters()
        layer.merge()
        assert not any(torch.equal(getattr(layer, name), before[name]) for name in weights)
        state = layer.state_dict()
        assert all(torch.equal(state[name], before[name]) for name in weights)
        layer.unmerge()
        assert all(torch.equal(getattr(layer, name), before[name]) for name in weights)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@each_case
def test_state_dict_copies_and_pickles(case: Case, merged: bool) -> None:
    layer, other = layer_of(case), layer_of(case)
    args = [normal(*shape) for shape in case[2]]
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    if merged:
        layer.merge()
    other.load_state_dict(layer.state_dict())
    y = flat(layer(*args))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for one in copies:
        assert type(one) is type(layer) and one.merged == merged
        assert all(map(torch.equal, flat(one(*args)), y))
        nn.init.zeros_(getattr(one, case[1][0]))
        assert all(map(torch.equal, flat(layer(*args)), y))
    if merged:
        layer.unmerge()
    assert all(map(torch.equal, flat(layer(*args)), flat(other(*args))))


def test_a_moved_rnn_uses_its_new_weights() -> None:
    layer = layer_of(CASES["GRU"]).float()
    args = [normal(6, 3, 5, dtype=torch.float32)]
    truth = expected(layer, CASES["GRU"][1], *args)[0]
    torch.testing.assert_close(layer(*args)[0], truth)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    assert not torch.allclose(layer(*args)[0], truth)


def test_the_base_comes_back() -> None:
    layer = layer_of(CASES["GRU"])
    base = layer.get_base_layer()
    assert type(base) is nn.GRU and not [n for n in base.state_dict() if "lora" in n]
    layer.merge()
    x = normal(6, 3, 5)
    assert torch.equal(layer.get_base_layer()(x)[0], layer(x)[0])


def test_a_recurrent_base_reads_weights_of_its_own() -> None:
    layer = AnyLayer.from_module(nn.GRU(5, 4), ["weight_ih_l0"], 2, init_lora_weights=False)
    base, x = layer.get_base_layer(), normal(6, 3, 5, dtype=torch.float32)
    y, adapted = base(x)[0], layer(x)[0]
    layer.merge()
    torch.testing.assert_close(layer(x)[0], adapted)
    assert torch.equal(base(x)[0], y) and not torch.allclose(adapted, y)


def test_names_in_pefts_checkpoints_are_those_of_target_parameters() -> None:
    layer = layer_of(CASES["own"])
    shapes = {name: tuple(p.shape) for name, p in layer.peft_parameters("default").items()}
    assert shapes == {
        "base_layer.lora_A.weight": (RANK, 5),
        "base_layer.lora_B.weight": (4, RANK),
        "lora_A.weight": (RANK, 15),
        "lora_B.weight": (4, RANK),
    }


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no such": (nn.GRU(2, 2), ["weight"], ValueError, "got 'weight', expected some of"),
    "a vector": (nn.GRU(2, 2), ["bias_ih_l0"], ValueError, "got 'bias_ih_l0'"),
    "a child's": (Experts(), ["norm.weight"], ValueError, "adapt a child for its own"),
    "none": (nn.GRU(2, 2), [], ValueError, "got 'none'"),
    "no module": (torch.zeros(2), ["weight"], TypeError, "got Tensor"),
    "adapted": (Linear(2, 2, 1), ["weight"], TypeError, "without adapters"),
}


@pytest.mark.parametrize(("module", "weights", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(
    module: Any, weights: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        AnyLayer.from_module(module, weights)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_what_a_weight_has_no_place_for_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        layer_of(CASES["GRU"], **option)
