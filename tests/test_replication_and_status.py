"""Repeated layers against PEFT, initialising shared weights, and what status reports say."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import BUILDERS
from torch import nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.adapters.status import IRREGULAR
from lora_ext.errors import AdapterFileError
from lora_ext.io import CONFIG_NAME

LAYERS = [[0, 2], [1, 3]]


def config_of(**fields: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["q_proj", "v_proj"]} | fields


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_replicated_layers_are_pefts(family: str, tmp_path: Path) -> None:
    base, inputs = BUILDERS[family]()
    fields = config_of(target_modules=None, layer_replication=LAYERS)
    inputs = inputs | {"use_cache": False} if family != "bert" else inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path)
        ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert ours.targeted_module_names == theirs.targeted_module_names
    expected = theirs.eval()(**inputs).loss
    torch.testing.assert_close(ours(**inputs).loss, expected, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    weights = [layer.weight for _, layer in ours.lora_layers()]
    with pytest.warns(UserWarning, match="shared a weight"):
        ours.merge_adapter()  # PEFT adds the updates of all copies to the one weight
    torch.testing.assert_close(ours(**inputs).loss, expected, rtol=1e-5, atol=1e-6)
    ours.unmerge_adapter()
    now = [layer.weight for _, layer in ours.lora_layers()]
    assert all(one is other for one, other in zip(now, weights, strict=True))


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_each_copy_has_a_cache_of_its_own(family: str) -> None:
    base, inputs = BUILDERS[family]()
    fields = {"layer_replication": LAYERS, "init_lora_weights": False}
    model = get_lora_model(base, LoraConfig(**fields)).eval()
    tokens = inputs["input_ids"]
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        start = model(tokens[:, :-2], use_cache=True)
        rest = model(tokens[:, -2:], past_key_values=start.past_key_values, use_cache=True)
    assert len(start.past_key_values.layers) == 4
    torch.testing.assert_close(rest.logits, whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_a_failure_puts_the_layers_back() -> None:
    base, _ = BUILDERS["llama"]()
    layers, count = base.model.layers, base.config.num_hidden_layers
    fields = config_of(layer_replication=LAYERS, target_modules=["nothing"])
    with pytest.raises(ValueError, match="target_modules"):
        get_lora_model(base, LoraConfig(**fields))
    assert base.model.layers is layers and base.config.num_hidden_layers == count
    with pytest.raises(ValueError, match="layer_replication"):
        get_lora_model(base, LoraConfig(**config_of(layer_replication=[[0, 99]])))
    model = get_lora_model(base, LoraConfig(**config_of()))
    with pytest.raises(ValueError, match="first adapter"):
        model.add_adapter("more", LoraConfig(**config_of(layer_replication=LAYERS)))


def test_a_second_adapter_of_repeated_layers_says_none(tmp_path: Path) -> None:
    """As the error about it says, of files too."""
    fields = config_of(layer_replication=LAYERS)
    saved = get_lora_model(BUILDERS["llama"]()[0], LoraConfig(**fields))
    saved.save_pretrained(tmp_path)
    model = LoraModel.from_pretrained(BUILDERS["llama"]()[0], tmp_path)
    with pytest.raises(AdapterFileError, match=r"set its layer_replication to None .* null in"):
        model.load_adapter(tmp_path, "more")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": None}))
    loaded = model.load_adapter(tmp_path, "more")
    assert not loaded.missing_keys and not loaded.unexpected_keys


MUTATING = ["pissa", "pissa_niter_2", "olora"]


@pytest.mark.parametrize("kind", MUTATING)
def test_initialisation_of_a_shared_weight_is_refused(kind: str, tmp_path: Path) -> None:
    """Each layer would take its product out of the one weight: wrong outputs from the start."""
    base, _ = BUILDERS["llama"]()
    layers, before = base.model.layers, copy.deepcopy(base.state_dict())
    fields = config_of(layer_replication=LAYERS, init_lora_weights=kind)
    with pytest.raises(ValueError, match=rf"init_lora_weights: got '{kind}', .*q_proj' and 3 more"):
        get_lora_model(base, LoraConfig(**fields))
    plain = LoraConfig(**fields | {"init_lora_weights": True})
    get_lora_model(copy.deepcopy(base), plain).save_pretrained(tmp_path)
    config = tmp_path / CONFIG_NAME
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": kind}))
    with pytest.raises(AdapterFileError, match=rf"init_lora_weights: got '{kind}'"):
        LoraModel.from_pretrained(base, tmp_path)
    assert base.model.layers is layers
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", MUTATING)
def test_initialisation_beside_a_shared_weight(kind: str) -> None:
    """A tied head is refused; what shares nothing starts at the base's outputs, also beside a tied
    embedding, which no initialisation changes."""

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9))
        net[2].weight = net[0].weight
        return net

    tokens, base = torch.arange(9), net()
    for targets in (["2"], ["0", "1", "2"]):
        config = LoraConfig(**config_of(target_modules=targets, init_lora_weights=kind))
        with pytest.raises(ValueError, match=r"weight of '2', but other modules share it"):
            get_lora_model(base, config)
    pairs = zip(base.parameters(), net().parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    fields = config_of(target_modules=["0", "1"], init_lora_weights=kind)
    model = get_lora_model(net(), LoraConfig(**fields))
    assert not torch.equal(model.get_base_model()[1].weight, base[1].weight)
    torch.testing.assert_close(model(tokens), base(tokens), rtol=1e-5, atol=1e-5)


def test_status() -> None:
    base, _ = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(**config_of()))
    model.add_adapter("other", LoraConfig(**config_of(target_modules=["q_proj"], lora_alpha=4)))
    rows = {row.name: row for row in model.get_layer_status()}
    first = rows["model.model.layers.0.self_attn.q_proj"]
    assert first.module_type == "lora.Linear" and first.enabled
    assert first.available_adapters == ["default", "other"]
    assert first.active_adapters == ["default"] and first.merged_adapters == []
    assert first.requires_grad == {"default": True, "other": False}
    assert first.scaling == {"default": 4.0, "other": 2.0} and first.devices["other"] == ["cpu"]
    status = model.get_model_status()
    assert (status.base_model_type, status.num_adapter_layers) == ("LlamaForCausalLM", 6)
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.available_adapters == ["default", "other"] and status.enabled is True
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()

    layer = base.model.layers[0].self_attn.q_proj
    layer.set_adapter("other")
    layer.merge()
    status = model.get_model_status()
    assert status.active_adapters == status.merged_adapters == IRREGULAR
    assert status.requires_grad == {"default": IRREGULAR, "other": IRREGULAR}
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == IRREGULAR
