"""inject_adapter_in_model(state_dict=...): target modules read off keys, as PEFT does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from lora_ext.nn import LoraLayer

KEYS = ("1.lora_A.weight", "1.lora_B.weight", "2.lora_embedding_A", "2.lora_embedding_B")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 4))


def state(keys: tuple[str, ...] = KEYS, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{key}": torch.zeros(1) for key in keys}


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod."])
def test_the_keys_say_what_is_adapted(prefix: str) -> None:
    config = LoraConfig(r=2, target_modules=["1", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject_adapter_in_model(config, net(), state_dict=state(prefix=prefix))
    assert adapted(model) == ["1", "2"]
    assert tuple(get_peft_model_state_dict(model)) == KEYS
    assert config.target_modules == ["1", "2"]  # stays as it was


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more": ({"target_modules": ["0", "1", "2"]}, r"PEFT config contained .*: \['0'\]"),
    "less": ({"target_modules": ["1"]}, r"state_dict contained .*: \['2'\]"),
    "excluded": (
        {"target_modules": ["1", "2"], "exclude_modules": ["2"]},
        r"state_dict contained .*: \['2'\]",
    ),
    "others": ({"target_modules": ["3"]}, r"config contained .*: \['3'\].*: \['1', '2'\]"),
    "none": ({}, r"state_dict contained .*: \['1', '2'\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_means_others_is_warned_of(name: str) -> None:
    fields, text = CONFIGS[name]
    with pytest.warns(RuntimeWarning, match=text):
        model = inject_adapter_in_model(LoraConfig(r=2, **fields), net(), state_dict=state())
    assert adapted(model) == ["1", "2"]
    if fields:
        with pytest.warns(RuntimeWarning, match=text):
            theirs = peft.inject_adapter_in_model(
                peft.LoraConfig(r=2, **copy.deepcopy(fields)), net(), state_dict=state()
            )
        shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        right = peft.get_peft_model_state_dict(theirs)
        assert shapes == {key: value.shape for key, value in right.items()}


@pytest.mark.parametrize(
    ("fields", "keys", "text"),
    [
        ({"target_parameters": ["0.weight"]}, KEYS, "config uses `target_parameters`"),
        ({"target_modules": ["1"]}, ("9.lora_A.weight",), "got 1 keys"),
        ({"target_modules": ["1"]}, (), "got 0 keys"),
    ],
    ids=["target_parameters", "other modules", "empty"],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], keys: tuple[str, ...], text: str
) -> None:
    model = net()
    with pytest.raises(ValueError, match=text):
        inject_adapter_in_model(LoraConfig(r=2, **fields), model, state_dict=state(keys))
    assert not adapted(model) and "peft_config" not in vars(model)
