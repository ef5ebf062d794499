"""PEFT's own layers on the operators here: patching and undoing it, what PEFT keeps and why, and
that nothing of PEFT's changes around the forward. Numbers: test_patched_peft_fuzz.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import dora
from peft.tuners.lora import layer as peft_layer
from tiny_models import gpt2, llama
from torch import Tensor, nn

import lora_ext
import lora_ext.integrations.peft as fused


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    fused.calls.clear()
    yield
    fused.unpatch()
    fused.calls.clear()


class Net(nn.Module):
    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Linear(6, 10)
        self.second = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def peft_model(net: nn.Module | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"r": 3, "target_modules": ["first", "second"]} | fields
    model: Any = peft.get_peft_model(net or Net(), peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.3)
    return model


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Patching


def test_patching_reaches_models_that_are_there_and_unpatching_gives_them_back() -> None:
    model, x = peft_model(), torch.randn(5, 6)
    own = peft_layer.Linear.forward, peft_layer.Embedding.forward
    want = model(x)
    assert not fused.is_patched()
    fused.patch()
    fused.patch()
    assert fused.is_patched()
    close(model(x), want)
    assert fused.calls == {fused.FUSED: 2}
    fused.unpatch()
    fused.unpatch()
    assert (peft_layer.Linear.forward, peft_layer.Embedding.forward) == own
    assert torch.equal(model(x), want) and fused.calls == {fused.FUSED: 2}


def test_models_that_are_loaded_later(tmp_path: Path) -> None:
    model, x = peft_model(), torch.randn(5, 6)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    fused.patch()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    close(loaded(x), model(x))
    assert fused.calls[fused.FUSED] == 4


def test_a_patch_of_someone_else_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: Any, x: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(peft_layer.Linear, "forward", theirs)
    with pytest.raises(RuntimeError, match=r"test_patched_peft.*undo the other patch"):
        fused.patch()
    assert peft_layer.Linear.forward is theirs
    assert peft_layer.Embedding.forward.__module__.startswith("peft.")
    monkeypatch.undo()
    fused.patch()
    monkeypatch.setattr(peft_layer.Linear, "forward", theirs)
    with pytest.raises(RuntimeError, match="unpatch"):
        fused.unpatch()


def test_accelerate_is_for_one_model(tmp_path: Path) -> None:
    model, other, x = peft_model(), peft_model(), torch.randn(5, 6)
    text, state, want = repr(model), model.state_dict(), model(x)
    assert fused.accelerate(model) is model
    fused.accelerate(model)
    assert repr(model) == text
    assert list(model.state_dict()) == list(state)
    close(model(x), want)
    assert fused.calls == {fused.FUSED: 2}
    other(x)
    assert fused.calls == {fused.FUSED: 2}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(copied(x), want)
    assert fused.calls == {fused.FUSED: 6}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(other).unload(), tmp_path)
    assert type(loaded.base_model.model.first) is peft_layer.Linear
    close(loaded(x), want)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    close(merged(x), want)


def test_accelerate_refuses_what_has_no_layer_of_peft() -> None:
    with pytest.raises(ValueError, match=r"accelerate: model: got a Net .*get_peft_model"):
        fused.accelerate(Net())
    with pytest.raises(TypeError, match="accelerate: model"):
        fused.accelerate("model")  # type: ignore[type-var]


def test_layers_of_adapters_that_are_added_later() -> None:
    model = fused.accelerate(peft_model(target_modules=["first"]))
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "more"])
    rows = {row.name.rpartition(".")[2]: row for row in fused.report(model)}
    assert rows["first"].fused and "2 adapters" in rows["first"].reason
    assert not rows["second"].fused and "not patched" in rows["second"].reason
    fused.accelerate(model)
    assert all(row.fused for row in fused.report(model))


def test_as_a_custom_module_of_a_config() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["first", "second"], fan_in_fan_out=True)
    config._register_custom_module({nn.Linear: fused.Linear, nn.Embedding: fused.Embedding})
    net = Net(nn.Embedding(7, 10))
    with pytest.warns(UserWarning, match="fan_in_fan_out: got True, expected False"):
        model: Any = peft.get_peft_model(net, config)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        assert type(layer) in (fused.Embedding, fused.Linear) and repr(layer).startswith("lora.")
    x = torch.randint(0, 7, (5,))
    y = model(x)
    assert fused.calls == {fused.FUSED: 2}
    close(model.merge_and_unload()(x), y)


def test_configs_of_lora_ext_as_those_of_peft() -> None:
    fields = {"r": 5, "target_modules": ["q_proj"], "use_dora": True, "rank_pattern": {"0": 2}}
    ours, theirs = lora_ext.LoraConfig(**fields), peft.LoraConfig(**fields)
    assert fused.peft_config(ours).to_dict() == theirs.to_dict()
    with pytest.raises(TypeError, match="peft_config"):
        fused.peft_config(3)  # type: ignore[arg-type]


def test_add_adapter_of_a_model_of_transformers(tmp_path: Path) -> None:
    config = lora_ext.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model, inputs = llama()
    base = model(**inputs).logits
    fused.patch()
    try:
        model.add_adapter(config, "mine")
    except ValueError as error:
        pytest.skip(f"transformers wants another PEFT for this: {error}")
    adapted = model(**inputs).logits
    assert fused.calls == {fused.FUSED: 3} and not torch.allclose(adapted, base)
    model.disable_adapters()
    close(model(**inputs).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama()[0], tmp_path)
    close(again(**inputs).logits, adapted)
    fused.unpatch()
    close(model(**inputs).logits, adapted)


# What runs


def test_every_layer_of_a_transformer_is_fused() -> None:
    for build in (llama, gpt2):
        base, inputs = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D
            model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
        layers = [m for m in model.modules() if isinstance(m, peft_layer.LoraLayer)]
        want = model(**inputs).loss
        fused.patch()
        close(model(**inputs).loss, want)
        assert fused.calls == {fused.FUSED: len(layers)} and len(layers) > 10
        rows = fused.report(model)
        assert len(rows) == len(layers) and all(row.fused for row in rows)
        assert str(rows).endswith(f"{len(layers)} of {len(layers)} layers run fused")
        fused.unpatch()
        fused.calls.clear()


def test_base_alone() -> None:
    model, x = peft_model(), torch.randn(5, 6)
    fused.patch()
    with model.disable_adapter():
        base = model(x)
        assert fused.calls == {fused.BASE_ALONE: 2}
        assert {row.path for row in fused.report(model)} == {"base"}
    close(base, model.get_base_model()(x) * 0 + Net_of(model)(x))
    model.merge_adapter()
    model(x)
    assert fused.calls[fused.BASE_ALONE] == 4
    model.unmerge_adapter()
    with model.disable_adapter():  # PEFT unmerges a merged layer that is disabled
        model(x)


def Net_of(model: Any) -> nn.Module:
    return copy.deepcopy(model).unload()  # type: ignore[no-any-return]


def test_compiled_in_one_graph_without_recompiling() -> None:
    model, x = peft_model(lora_dropout=0.0), torch.randn(5, 6)
    want = model(x)
    fused.patch()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        close(compiled(x), want)
    assert len(graphs) == 1 and not fused.calls
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("lora_linear" in target for target in targets) == 2


def test_compiled_where_a_layer_is_left_to_peft() -> None:
    model, x = peft_model(), torch.randn(5, 6)
    model.base_model.model.second.lora_B["default"].register_forward_hook(lambda *a: None)
    want = model(x)
    fused.patch()
    close(torch.compile(model, backend="eager")(x), want)


def test_hooks_of_the_layer_itself_run() -> None:
    model, x, seen = peft_model(), torch.randn(5, 6), []
    layer = model.base_model.model.first
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    fused.patch()
    model(x).sum().backward()
    assert seen == [(5, 10), (5, 10)] and fused.calls == {fused.FUSED: 2}


# What is left to PEFT


class MyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Quantized(Tensor):
    pass


def hooked(part: str) -> Any:
    def change(layer: Any) -> None:
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        module.register_forward_hook(lambda module, args, y: y * 1.5)

    return change


def forward_set(layer: Any) -> None:
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: own(x) + 1


def compiled(layer: Any) -> None:
    layer.base_layer.compile(backend="eager")


def bias_of_a(layer: Any) -> None:
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(3))


def float64_adapter(layer: Any) -> None:
    layer.lora_A["default"].double()
    layer.lora_B["default"].double()


def tensor_subclass(layer: Any) -> None:
    weight = layer.base_layer.weight.detach().as_subclass(Quantized)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def own_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5)


LEFT: dict[str, tuple[Any, str]] = {
    "hook of the base": (hooked("base_layer"), "base_layer has hooks"),
    "hook of A": (hooked("lora_A"), "lora_A has hooks"),
    "hook of B": (hooked("lora_B"), "lora_B has hooks"),
    "hook of dropout": (hooked("lora_dropout"), "lora_dropout has hooks"),
    "forward set": (forward_set, "base_layer has a forward set on it"),
    "compiled base": (compiled, "base_layer is compiled by itself"),
    "bias of A": (bias_of_a, "lora_A has a bias"),
    "dtypes": (float64_adapter, "dtypes: x torch.float32"),
    "tensor subclass": (tensor_subclass, "the base's weight is a Quantized"),
    "own dropout": (own_dropout, "lora_dropout is a torch.nn.modules.dropout.AlphaDropout"),
}


@pytest.mark.parametrize("change,reason", LEFT.values(), ids=LEFT)
def test_left_to_peft(change: Any, reason: str) -> None:
    model, x = peft_model().eval(), torch.randn(5, 6)
    layer = model.base_model.model.first
    change(layer)
    torch.manual_seed(1)
    want = layer(x)
    fused.patch()
    torch.manual_seed(1)
    assert torch.equal(layer(x), want)
    (left,) = fused.calls
    assert left.startswith(reason)
    row = fused.report(model)[0]
    assert (row.fused, row.path, row.reason) == (False, "peft", left)


def test_left_by_class_of_the_base() -> None:
    model, x = peft_model(Net(MyLinear(6, 10))), torch.randn(5, 6)
    want = model(x)
    fused.patch()
    close(model(x), want)
    row = fused.report(model)[0]
    assert not row.fused and "MyLinear, of its own forward" in row.reason


def test_left_by_variant() -> None:
    config = {"target_modules": ["first"], "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    model = peft_model(llama()[0], **config | {"target_modules": ["q_proj"]})
    fused.patch()
    assert {row.reason for row in fused.report(model)} == {
        "'default' is of a variant, ALoraLinearVariant"
    }


def test_left_by_kind_of_layer() -> None:
    net = nn.ModuleDict({"first": nn.Conv1d(6, 10, 1), "second": nn.Linear(3, 3)})
    model = peft_model(net)
    fused.patch()
    rows = fused.report(model)
    assert [row.kind for row in rows] == ["Conv1d", "Linear"]
    assert rows[0].reason == "there is no fused call for a lora.Conv1d" and rows[1].fused


def test_left_for_hooks_of_all_modules() -> None:
    model, x, seen = peft_model(), torch.randn(5, 6), []
    fused.patch()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        model(x)
    finally:
        handle.remove()
    assert fused.calls == {"hooks are registered for all modules": 2}
    assert seen.count(nn.Linear) == 6


def test_left_for_what_is_passed_on_to_the_base() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    layer = peft_model(Net(Scaled(6, 10))).base_model.model.first
    x = torch.randn(5, 6)
    want = layer(x, scale=2.0)
    fused.patch()
    assert torch.equal(layer(x, scale=2.0), want)
    assert fused.calls == {"the base layer is called with further arguments": 1}


def test_left_for_inputs_of_other_kinds() -> None:
    layer = peft_model().base_model.model.first
    fused.patch()
    ragged = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    assert layer(ragged).is_nested
    assert isinstance(layer(torch.randn(5, 6).as_subclass(Quantized)), Quantized)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|same dtype"):  # PEFT's own error
        layer(torch.randn(5, 6).double())
    assert fused.FUSED not in fused.calls and len(fused.calls) == 3


def test_left_for_caching_of_dora(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = peft_model(use_dora=True).eval(), torch.randn(5, 6)
    fused.patch()
    assert all(row.fused and "DoRA" in row.reason for row in fused.report(model))
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
    model(x)
    assert fused.calls == {"DoRA's caching is on": 2}
    held = [part._dora_cache for part in model.modules() if hasattr(part, "_dora_cache")]
    assert len(held) == 2 and all(held)
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", False)
    model(x)
    assert fused.calls[fused.FUSED] == 2 and not any(held)  # else it is used when it is on again


def test_report_of_other_models() -> None:
    assert str(fused.report(Net())).startswith("no LoRA layer of PEFT is in this model")
    with pytest.raises(TypeError, match="report: model"):
        fused.report("model")  # type: ignore[arg-type]
    rows = fused.report(peft_model())
    assert {row.reason for row in rows} == {"not patched: call patch() or accelerate(model)"}


# Several adapters, mixed batches


def test_mixed_batch_and_its_refusals() -> None:
    model = peft_model(lora_bias=True)
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=["first"], use_rslora=True))
    with torch.no_grad():
        model.base_model.model.first.lora_B["other"].weight.normal_()
    model.eval()
    x, names = torch.randn(5, 6), ["default", "__base__", "other", "default", "other"]
    want = model(x, adapter_names=names)
    fused.patch()
    close(model(x, adapter_names=names), want)
    assert fused.calls == {fused.FUSED: 2}
    close(model(x, adapter_names=["__base__"] * 5), Net_of(model)(x))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=names[:-1])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=names)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_of_a_mixed_batch_does_not_reach_rows_of_others(part: str) -> None:
    model = peft_model()
    model.add_adapter("broken", peft.LoraConfig(r=2, target_modules=["first"]))
    with torch.no_grad():
        getattr(model.base_model.model.first, part)["broken"].weight.fill_(float("inf"))
    model.eval()
    x, names = torch.randn(3, 6), ["default", "broken", "__base__"]
    want = model(x, adapter_names=names)[[0, 2]]
    fused.patch()
    got = model(x, adapter_names=names)
    close(got[[0, 2]], want)
    assert not got[1].isfinite().all()


def test_adapters_draw_masks_of_their_own() -> None:
    """As in PEFT: two adapters with the same probability do not drop the same elements."""
    model = peft_model(lora_dropout=0.5, target_modules=["first"])
    model.add_adapter("other", peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["first"]))
    layer = model.base_model.model.first
    with torch.no_grad():
        for name in ("default", "other"):
            layer.lora_A[name].weight.copy_(torch.eye(3, 6))
            layer.lora_B[name].weight.copy_(torch.eye(10, 3))
        layer.lora_B["other"].weight.neg_()
    model.base_model.set_adapter(["default", "other"])
    x = torch.ones(400, 6)
    fused.patch()
    # With one mask for both they would cancel.
    assert ((layer(x) - layer.base_layer(x)).abs() > 1e-3).float().mean() > 0.1


def test_scaling_as_a_tensor() -> None:
    """prepare_model_for_compiled_hotswap makes scalings tensors."""
    model, x = peft_model(use_dora=True), torch.randn(5, 6)
    want = model(x)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    fused.patch()
    close(model(x), want)
    assert fused.calls == {fused.FUSED: 2}


def test_names_of_lora_ext_without_peft_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['peft'] = None; import lora_ext.integrations.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: lora_ext.integrations.peft needs peft" in done.stderr
    assert lora_ext.__version__
