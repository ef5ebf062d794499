"""Layers over bases that another module cannot stand for: subclasses, replaced forwards, compiled
in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.parallel
from accelerate.hooks import ModelHook, add_hook_to_module
from layer_kinds import KINDS, Kind, Stack, X, each_kind, expected, first
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_ext.nn as lora
from lora_ext import LoraConfig, LoraModel, explain, get_lora_model


class Super(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Members(nn.Linear):
    GAIN = 2.0
    shift = property(lambda self: 1.0)

    def after(self, y: Tensor) -> Tensor:
        return y * self.GAIN + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.linear(x, self.weight, self.bias))


class Arguments(nn.Linear):
    def forward(self, x: Tensor, gain: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return F.linear(x, self.weight, self.bias) * gain + shift


class Logged(nn.Linear):
    """Computes what nn.Linear does, so its weight can hold an update."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Named(nn.Linear):
    """Keeps nn.Linear's forward."""

    def name(self) -> str:
        return "named"


def update(layer: Any, x: Tensor) -> Tensor:
    return layer.get_scale("default") * (x @ layer.lora_A.t() @ layer.lora_B.t())


@pytest.mark.parametrize("kind", [Super, Members, Arguments, Logged, Named])
def test_the_base_is_called_and_the_update_added(kind: type[nn.Linear]) -> None:
    base = kind(8, 6)
    x = torch.randn(3, 8, requires_grad=True)
    options = {"gain": 3.0, "shift": 0.5} if kind is Arguments else {}
    layer: Any = lora.Linear.from_linear(base, r=2, lora_dropout=0.0, init_lora_weights=False)
    y = layer(x, **options)
    want = base(x, **options) + update(layer, x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])
    expected = torch.autograd.grad(want.sum(), [x, layer.lora_A, layer.lora_B])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert layer.get_base_layer() is base
    assert isinstance(layer, lora.Linear) and layer.in_features == 8
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x, **options), y)


@pytest.mark.parametrize("kind", [Super, Members, Arguments, Logged, Named])
def test_merging_never_changes_what_the_layer_computes(kind: type[nn.Linear]) -> None:
    model = get_lora_model(
        nn.Sequential(kind(8, 6)),
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    )
    base, x = model.get_base_model()[0].base_layer, torch.randn(3, 8)
    weight, y = base.weight.clone(), model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    into_weight = kind in (Logged, Named)
    assert torch.equal(base.weight, weight) is not into_weight
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight) and torch.equal(model(x), y)
    if into_weight:
        plain = model.merge_and_unload()
        assert plain[0] is base
        torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="something else than a product with its weight"):
            model.merge_and_unload()
        assert torch.equal(base.weight, weight) and torch.equal(model(x), y)
        assert "forward of its own" in str(explain(model))


def test_a_subclass_that_keeps_its_forward_runs_fused_with_its_methods() -> None:
    layer: Any = lora.Linear.from_linear(Named(8, 6), r=2)
    assert layer.name() == "named"
    assert explain(layer)[0].path == explain(lora.Linear(8, 6, r=2))[0].path


class Transposed(Conv1D):
    """Of transformers' class, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", [Conv1D, Transposed])
@pytest.mark.parametrize("targets", ["all-linear", ["2"]], ids=["all-linear", "by name"])
def test_subclasses_of_conv1d_are_adapted_as_peft_does(
    targets: Any, kind: type[nn.Module], tmp_path: Path
) -> None:
    net = nn.Sequential(kind(8, 8), nn.Tanh(), kind(6, 8))
    fields = {"r": 2, "target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": True}
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**fields))
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert ours.targeted_module_names == theirs.targeted_module_names
    torch.testing.assert_close(ours(X), theirs.eval()(X), rtol=1e-5, atol=1e-5)


def test_a_base_that_returns_no_tensor_is_refused_when_called() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    layer = lora.Linear.from_linear(Pair(8, 6), r=2)
    with pytest.raises(TypeError, match="Pair, returned a tuple, expected a tensor"):
        layer(X)
    layer.enable_adapters(False)
    assert layer(X)[1] is None


def doubled_by_a_hook(base: nn.Module) -> None:
    base.register_forward_hook(lambda module, args, y: 2 * y)


def doubled_before(base: nn.Module) -> None:
    base.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def doubled_by_accelerate(base: nn.Module) -> None:
    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return 2 * output

    add_hook_to_module(base, Double())


@pytest.mark.parametrize("double", [doubled_by_a_hook, doubled_before, doubled_by_accelerate])
def test_what_is_around_a_call_is_not_in_the_weight(double: Callable[[nn.Module], None]) -> None:
    base = Named(8, 6)
    double(base)
    model = get_lora_model(
        nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    y = model(X)
    torch.testing.assert_close(
        y, base(X) + update(model.get_base_model()[0], X), rtol=1e-5, atol=1e-5
    )
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    with pytest.raises(ValueError, match="something else than a product with its weight"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="init_lora_weights: got 'pissa'"):
        lora.Linear.from_linear(base, r=2, init_lora_weights="pissa")


def test_a_call_of_its_own_is_called() -> None:
    class Called(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + 1

    base = Called(8, 6)
    layer = lora.Linear.from_linear(base, r=2, init_lora_weights=False)
    torch.testing.assert_close(layer(X), base(X) + update(layer, X), rtol=1e-5, atol=1e-5)


def test_a_copy_has_the_adapter_of_a_base_that_copies_itself() -> None:
    class Copied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            twin = Copied(self.in_features, self.out_features)
            twin.load_state_dict(self.state_dict())
            return twin

    layer = lora.Linear.from_linear(Copied(8, 6), r=2, init_lora_weights=False)
    twin = copy.deepcopy(layer)
    assert isinstance(twin, lora.Linear) and torch.equal(twin(X), layer(X))


def test_the_result_has_the_bases_dtype_under_autocast() -> None:
    layer = lora.Linear.from_linear(Super(8, 6), r=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16


def test_what_is_inside_a_base_that_is_kept_has_no_adapter_of_its_own() -> None:
    class Parent(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x))

    for options in (
        {"target_modules": ["0", "inner"]},
        {"target_modules": ["0"], "modules_to_save": ["inner"]},
    ):
        model = nn.Sequential(Parent())
        with pytest.raises(ValueError, match=r"'0.inner' is inside of '0'"):
            get_lora_model(model, LoraConfig(r=2, **options))
        assert type(model[0]) is Parent


def test_own_forwards_refuse_what_needs_a_product() -> None:
    for option in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="Super has a forward of its own"):
            lora.Linear.from_linear(Super(8, 6), r=2, **option)


@each_kind
def test_a_base_compiled_in_place(kind: Kind) -> None:
    make, adapt, args = kind
    base = make().eval()
    _, want = expected(base, adapt, args)
    torch._dynamo.reset()
    base.compile(backend="eager")
    torch.manual_seed(1)
    if adapt is KINDS["MultiheadAttention"][1] or make in (KINDS["AnyLayer"][0], Stack):
        with pytest.warns(UserWarning, match="compiled in place"):
            layer = adapt(base)
    elif adapt is KINDS["DoRA"][1]:
        with pytest.raises(ValueError, match=r"use_dora.*compiled in place"):
            adapt(base)
        return
    else:
        layer = adapt(base)
    torch.testing.assert_close(first(layer(*args)), want, rtol=1e-5, atol=1e-5)


def compiled(layer: nn.Module) -> None:
    layer.compile(backend="eager")


def patched(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **options: forward(*args, **options)


def hooked(layer: nn.Module) -> None:
    add_hook_to_module(layer, ModelHook())


@each_kind
@pytest.mark.parametrize("change", [compiled, patched, hooked])
def test_the_base_of_a_layer_whose_call_was_changed(
    kind: Kind, change: Callable[[nn.Module], None]
) -> None:
    make, adapt, args = kind
    base = make().eval()
    want = first(base(*args))
    layer = adapt(base)
    y = first(layer(*args))
    torch._dynamo.reset()
    change(layer)
    torch.testing.assert_close(first(layer(*args)), y)
    torch.testing.assert_close(first(layer.get_base_layer()(*args)), want)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("change", [patched, hooked])
def test_a_base_whose_forward_is_replaced(name: str, change: Callable[[nn.Module], None]) -> None:
    make, adapt, args = KINDS[name]
    base = make()
    _, want = expected(base, adapt, args)
    change(base)
    torch.manual_seed(1)
    layer = adapt(base)
    torch.testing.assert_close(layer(*args), want, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(*args), want, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert layer.get_base_layer() is base
    assert "replaced on the instance" in str(explain(layer))


@pytest.mark.parametrize("name", ["MultiheadAttention", "AnyLayer"])
@pytest.mark.parametrize("change", [patched, hooked])
def test_a_replaced_forward_that_no_layer_can_call_is_refused(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    """The layer would run the instance's forward, which knows no adapter."""
    make, adapt, args = KINDS[name]
    base = make().eval()
    change(base)
    attributes, want = dict(base.__dict__), first(base(*args))
    with pytest.raises(ValueError, match=r"base: its forward is replaced on the instance"):
        adapt(base)
    assert base.__dict__ == attributes and torch.equal(first(base(*args)), want)


def test_hooks_of_a_bases_state_dict_stay_with_it() -> None:
    base, seen = nn.Linear(8, 6), []
    base.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer = lora.Linear.from_linear(base, r=2)
    layer.load_state_dict(layer.state_dict())
    assert seen == [base]
