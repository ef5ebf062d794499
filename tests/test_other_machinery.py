"""Adapters in layers that other machinery changes: accelerate's offloading, pruning, DataParallel,
encoders with fast paths, models inside models."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.parallel
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from layer_kinds import KINDS, OPTIONS, SEQUENCE, Kind, X, each_kind, first
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import lora_ext
import lora_ext.nn as lora
from lora_ext import LoraConfig, LoraModel, get_lora_model

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
    cpu_offload(model.get_base_model(), execution_device="cpu")
    for change in (model.merge_adapter, model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match="remove_hook_from_module"):
            change()
    with pytest.raises(ValueError, match="reads the layer's weight, but a hook offloads it"):
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


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@each_kind
def test_what_was_merged_and_is_computed_since_stays_merged(
    kind: Kind, change: Callable[[nn.Module, str], Any]
) -> None:
    make, adapt, args = kind
    layer = adapt(make()).eval()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    name = next(name for name in layer.base_parameters if "." not in name)
    change(layer, name)
    y = first(layer(*args))
    calls = (layer.unmerge, lambda: layer.enable_adapters(False))
    for call in (*calls, lambda: layer.set_adapter("default")):
        with pytest.raises(ValueError, match=f"unmerge: its {name} is computed from other"):
            call()
    with pytest.raises(RuntimeError, match=f"unmerge: its {name} is computed from other"):
        layer.load_state_dict(state, strict=False)
    assert layer.merged
    assert torch.equal(first(layer(*args)), y)


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
