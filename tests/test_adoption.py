"""Layers over bases that another module cannot stand for (subclasses, replaced forwards, compiled
in place, offloaded), and adapters in layers that other machinery changes."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.parallel
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import lora_ext
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
    base, x = model.base_model[0].base_layer, torch.randn(3, 8)
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
    torch.testing.assert_close(y, base(X) + update(model.base_model[0], X), rtol=1e-5, atol=1e-5)
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


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


OPTIONS: dict[str, Any] = {"r": 2, "init_lora_weights": False}
X, TOKENS, SEQUENCE = torch.randn(3, 8), torch.tensor([1, 2]), torch.randn(3, 2, 8)
Kind = tuple[Callable[[], nn.Module], Callable[[Any], Any], tuple[Tensor, ...]]
KINDS: dict[str, Kind] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda b: lora.Linear.from_linear(b, **OPTIONS), (X,)),
    "DoRA": (
        lambda: nn.Linear(8, 6),
        lambda b: lora.Linear.from_linear(b, use_dora=True, **OPTIONS),
        (X,),
    ),
    "MergedLinear": (
        lambda: nn.Linear(8, 6),
        lambda b: lora.MergedLinear.from_linear(b, enable_lora=[True, False], **OPTIONS),
        (X,),
    ),
    "Embedding": (
        lambda: nn.Embedding(9, 6),
        lambda b: lora.Embedding.from_embedding(b, **OPTIONS),
        (TOKENS,),
    ),
    "Conv2d": (
        lambda: nn.Conv2d(3, 6, 3),
        lambda b: lora.Conv2d.from_conv(b, **OPTIONS),
        (torch.randn(1, 3, 8, 8),),
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2),
        lambda b: lora.MultiheadAttention.from_multihead_attention(b, **OPTIONS),
        (SEQUENCE, SEQUENCE, SEQUENCE),
    ),
    "AnyLayer": (
        lambda: nn.GRU(8, 8),
        lambda b: lora.AnyLayer.from_module(b, ["weight_ih_l0"], **OPTIONS),
        (X,),
    ),
    "ParamLayer": (
        Stack,
        lambda b: lora.ParamLayer.from_module(b, ["w"], **OPTIONS),
        (torch.randn(2, 5),),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def first(y: Any) -> Tensor:
    result: Tensor = y[0] if isinstance(y, tuple) else y
    return result


def expected(base: nn.Module, adapt: Callable[[Any], Any], args: Any) -> tuple[Any, Tensor]:
    """The layer over a plain copy of base, and its result."""
    torch.manual_seed(1)
    layer = adapt(copy.deepcopy(base))
    return layer, first(layer(*args))


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


def test_hooks_of_a_bases_state_dict_stay_with_it() -> None:
    base, seen = nn.Linear(8, 6), []
    base.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer = lora.Linear.from_linear(base, r=2)
    layer.load_state_dict(layer.state_dict())
    assert seen == [base]


# Offloaded by accelerate


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 3, 3, padding=1)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), convolution, nn.Linear(8, 4)).eval()


ALL = LoraConfig(r=2, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
NUMBERS = torch.randint(0, 9, (2, 3))


def test_adapters_in_an_offloaded_model(tmp_path: Any) -> None:
    want_model = small_net()
    torch.manual_seed(1)
    want = get_lora_model(want_model, ALL).eval()(NUMBERS)
    base = small_net()
    cpu_offload(base, execution_device="cpu")
    torch.manual_seed(1)
    model = get_lora_model(base, ALL).eval()
    torch.testing.assert_close(model(NUMBERS), want, rtol=1e-5, atol=2e-5)
    model(NUMBERS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"on 'meta'.*remove_hook_from_module"):
            merge()
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(small_net(), tmp_path)
    torch.testing.assert_close(loaded(NUMBERS), want, rtol=1e-5, atol=2e-5)
    remove_hook_from_module(base, recurse=True)
    model.merge_adapter()
    torch.testing.assert_close(model(NUMBERS), want, rtol=1e-5, atol=2e-5)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(NUMBERS), want, rtol=1e-5, atol=2e-5)
    assert not any(isinstance(module, lora.LoraLayer) for module in plain.modules())


def test_a_model_that_is_offloaded_with_its_adapters() -> None:
    model = get_lora_model(small_net(), ALL).eval()
    want = model(NUMBERS).detach()
    cpu_offload(model.base_model, execution_device="cpu")
    for change in (model.merge_adapter, model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match="remove_hook_from_module"):
            change()
    with pytest.raises(ValueError, match="read the layer's weight, but a hook offloads it"):
        model.add_adapter("dora", LoraConfig(r=2, target_modules=["1"], use_dora=True))
    model.add_adapter("second", ALL)
    model.set_adapter(["default", "second"])
    both = model(NUMBERS)
    assert not torch.equal(both, want)
    torch.testing.assert_close(model(NUMBERS), both)
    model.delete_adapter("second")
    torch.testing.assert_close(model(NUMBERS), want)


# Tensors that other machinery computes or takes away


class Twice(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "parametrize": lambda layer, name: parametrize.register_parametrization(layer, name, Twice()),
    "prune": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
    "weight_norm": lambda layer, name: weight_norm(layer, name),
    "parametrized weight_norm": lambda layer, name: parametrizations.weight_norm(layer, name),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@each_kind
def test_computed_tensors_are_used_and_not_written(
    kind: Kind, change: Callable[[nn.Module, str], Any]
) -> None:
    make, adapt, args = kind
    names = [n for n, p in adapt(make()).named_parameters(recurse=False) if p.dim() > 1]
    for name in names:
        layer = adapt(make()).eval()
        twin = copy.deepcopy(layer)
        change(layer, name)
        y = first(layer(*args))
        with torch.no_grad():
            getattr(twin, name).copy_(getattr(layer, name))
        torch.testing.assert_close(y, first(twin(*args)), rtol=1e-5, atol=1e-5)
        y.sum().backward()
        assert any(p.grad is not None for n, p in layer.named_parameters() if name in n), name
        refused = [layer.merge, layer.get_base_layer]
        if "lora" in name:
            refused.append(lambda layer=layer: layer.delete_adapter("default"))
            refused.append(lambda layer=layer: layer.rename_adapter("default", "other"))
            refused.append(lambda layer=layer: layer.peft_tensors("default"))
            of_adapter = lora_ext.lora_state_dict(layer).keys()
            assert any(key != name and name in key for key in of_adapter), name
        for call in refused:
            with pytest.raises(ValueError, match=f"{name} is computed from other tensors"):
                call()
        layer.set_adapter("default", inference_mode=True)
        trained = [n for n, p in layer.named_parameters() if p.requires_grad and "lora" in n]
        assert not trained


@pytest.mark.parametrize("name", [*KINDS, "LoraModel"])
def test_replicas_of_data_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "LoraModel":
        config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        layer: Any = get_lora_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), config)
        args: Any = (X,)
    else:
        make, adapt, args = KINDS[name]
        layer = adapt(make())

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> Any:
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    # What replicate() does on GPUs, but for the copies between them.
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    replica = module.replicate(layer, [0, 1])[1]  # type: ignore[attr-defined]
    y = first(replica(*args))
    torch.testing.assert_close(y, first(layer(*args)))
    y.sum().backward()
    trained = [p for n, p in layer.named_parameters() if "lora" in n and p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


# Layers and models inside others


@pytest.mark.parametrize("part", ["linear1", "linear2"])
@pytest.mark.parametrize("encoder", [False, True], ids=["layer", "encoder"])
def test_an_encoder_calls_a_layer_put_into_it_by_hand(part: str, encoder: bool) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    setattr(block, part, lora.Linear.from_linear(getattr(block, part), **OPTIONS))
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False) if encoder else block
    model.eval()
    y = model(SEQUENCE)
    with torch.no_grad():
        torch.testing.assert_close(model(SEQUENCE), y)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.inner(x))
        return result


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("inner", ["LoraModel", "by hand"])
def test_adapters_of_an_inner_model_stay_as_they_are(inner: str, name: str, tmp_path: Any) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: nn.Module = nn.Sequential(nn.Linear(8, 6))
    if inner == "LoraModel":
        model = get_lora_model(model, config)
    else:
        lora_ext.replace_linear(model, ["0"], **OPTIONS)
    y = model(X)
    outer = Outer(model)
    around = get_lora_model(
        outer, LoraConfig(r=2, target_modules=["last"], init_lora_weights=False), name
    )
    want = around(X)
    for change in (
        lambda: around.disable_adapters(),
        lambda: around.enable_adapters(),
        lambda: around.merge_adapter(),
        lambda: around.unmerge_adapter(),
        lambda: around.set_scale(name, 2.0),
        lambda: around.set_scale(name, 1.0),
        lambda: around.set_adapter(name),
        lambda: around.save_pretrained(tmp_path),
    ):
        change()
        assert torch.equal(model(X), y)
    assert torch.equal(around(X), want)
    trained = [n for n, p in outer.inner.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert list(around.lora_layers()) == [("last", outer.last)]
    plain = around.merge_and_unload()
    torch.testing.assert_close(plain(X), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(X), y)


def test_layers_of_another_model_are_not_taken() -> None:
    base = nn.Sequential(nn.Linear(8, 6))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_lora_model(base, config)
    y = model(X)
    with pytest.raises(ValueError, match="'0' has adapters that are not this model's"):
        get_lora_model(base, config, "second")
    assert torch.equal(model(X), y)


def test_a_model_with_pefts_layers_is_refused() -> None:
    import peft

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    for one in (model, model.base_model.model):
        with pytest.raises(TypeError, match="with PEFT's layers"):
            get_lora_model(one, LoraConfig(r=2, target_modules=["0"]))
