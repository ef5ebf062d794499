"""Each public call with each argument wrong: a TypeError or ValueError names the operation and the
argument, and nothing is changed."""

from __future__ import annotations

import copy
from collections import UserDict, UserList
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, functional, get_lora_model
from lora_ext import nn as lora

T = torch.zeros
STATE = T(2, dtype=torch.int64)
Arguments = dict[str, Any]
WRONG: dict[str, Any] = {
    "None": None,
    "text": "2",
    "float": 2.5,
    "negative": -1,
    "list": [1],
    "dict": {"r": -2},
    "array": np.ones((5, 4)),
    "object": object(),
    "class": nn.Linear,
    "tensor": T(7, 9),
}


class Call(NamedTuple):
    """A public call and arguments that are right."""

    make: Callable[[], Any]  # what it is called on, or the function itself
    method: str
    arguments: Arguments


def adapted() -> LoraModel:
    return get_lora_model(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()), LoraConfig(r=2, target_modules=["0"])
    )


def linear() -> lora.Linear:
    return lora.Linear(4, 4, r=2, lora_dropout=0.1)


AB: Arguments = {"lora_A": T(2, 4), "lora_B": T(3, 2)}
DEFAULT: Arguments = {"adapter_name": "default"}
LAYER: Arguments = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
FLAGS: Arguments = {"init_lora_weights": True, "use_rslora": False}
CONFIG = LoraConfig(r=2, target_modules=["0"])


def function(one: Callable[..., Any], **arguments: Any) -> Call:
    return Call(lambda: one, "", arguments)


def method(make: Callable[[], Any], name: str, **arguments: Any) -> Call:
    return Call(make, name, arguments)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


CALLS = {
    "lora_linear": function(
        functional.lora_linear, x=T(5, 4), weight=T(3, 4), bias=T(3),
        **AB, lora_bias=T(3), scaling=1.0, dropout_p=0.5, rng_state=STATE,
    ),
    "lora_linear_multi": function(
        functional.lora_linear_multi, x=T(5, 4), weights=[T(3, 4)], biases=[T(3)],
        lora_As=[T(2, 4)], lora_Bs=[T(3, 2)], lora_biases=[T(3)], scalings=1.0, dropout_p=0.5,
        rng_states=[STATE],
    ),
    "lora_mlp": function(
        lora_ext.lora_mlp, x=T(5, 4), weights=[T(6, 4), T(2, 3)], biases=[T(6), T(2)],
        lora_As=[T(2, 4), T(2, 3)], lora_Bs=[T(6, 2), T(2, 2)], lora_biases=[T(6), T(2)],
        activation="silu", scalings=1.0, dropout_p=0.5, rng_states=[STATE, STATE],
        recompute=False,
    ),
    "lora_embedding": function(
        functional.lora_embedding, indices=T(5).long(), weight=T(4, 3), **AB,
        scaling=1.0, padding_idx=1, scale_grad_by_freq=False,
    ),
    "column_scale": function(functional.column_scale, z=T(5, 3), scale=T(3), bias=T(3)),
    "dora_linear": function(
        functional.dora_linear, x=T(5, 4), weight=T(3, 4), bias=T(3), **AB, scale=T(3),
        scaling=1.0, dropout_p=0.5, rng_state=STATE,
    ),
    "dropout": function(functional.dropout, x=T(5, 4), rng_state=STATE, dropout_p=0.5),
    "dropout_mask": function(
        functional.dropout_mask, rng_state=STATE, rows=2, columns=3, dropout_p=0.5
    ),
    "draw_rng_state": function(functional.draw_rng_state, x=T(2)),
    "weight_norm": function(functional.weight_norm, weight=T(3, 4), **AB, scaling=1.0),
    "nn.Linear": function(
        lora.Linear, in_features=4, out_features=3, **LAYER, **FLAGS, lora_bias=False,
        use_dora=False, autocast_adapter_dtype=True,
    ),
    "nn.Embedding": function(lora.Embedding, num_embeddings=5, embedding_dim=4, r=2, lora_alpha=4),
    "nn.Conv1d": function(lora.Conv1d, in_channels=4, out_channels=4, kernel_size=3, **LAYER),
    "nn.MergedLinear": function(
        lora.MergedLinear, in_features=4, out_features=6, **LAYER, enable_lora=[True, False, True]
    ),
    "nn.MultiheadAttention": function(
        lora.MultiheadAttention, embed_dim=4, num_heads=2, r=2, lora_alpha=4,
        enable_lora=["q", "v"],
    ),
    "Linear.from_linear": function(
        lora.Linear.from_linear, linear=nn.Linear(4, 3), **LAYER, adapter_name="default"
    ),
    "Linear.forward": method(linear, "forward", x=T(5, 4)),
    "Linear.add_adapter": method(linear, "add_adapter", adapter_name="a", **LAYER, **FLAGS),
    "Linear.set_adapter": method(linear, "set_adapter", adapter_names=["default"]),
    "Linear.delete_adapter": method(linear, "delete_adapter", **DEFAULT),
    "Linear.rename_adapter": method(linear, "rename_adapter", old="default", new="b"),
    "Linear.set_scale": method(linear, "set_scale", adapter="default", scale=2.0),
    "Linear.get_scale": method(linear, "get_scale", **DEFAULT),
    "Linear.scale_layer": method(linear, "scale_layer", scale=2.0),
    "Linear.unscale_layer": method(linear, "unscale_layer", scale=2.0),
    "Linear.merge": method(linear, "merge", adapter_names=["default"]),
    "Linear.set_requires_grad": method(
        linear, "set_requires_grad", adapter_names=["default"], requires_grad=True
    ),
    "LoraConfig": function(
        LoraConfig, r=2, target_modules=["0"],
    ),
    "LoraConfig.from_dict": function(LoraConfig.from_dict, values={"r": 2}),
    "LoraConfig.from_pretrained": function(
        LoraConfig.from_pretrained, pretrained_model_name_or_path="x"
    ),
    "get_lora_model": function(
        get_lora_model, model=model(), peft_config=CONFIG, adapter_name="default"
    ),
    "LoraModel.from_pretrained": function(
        LoraModel.from_pretrained, model=model(), model_id="x", adapter_name="default"
    ),
    "LoraModel.add_adapter": method(adapted, "add_adapter", adapter_name="a", peft_config=CONFIG),
    "LoraModel.load_adapter": method(adapted, "load_adapter", model_id="x", adapter_name="a"),
    "LoraModel.save_pretrained": method(
        adapted, "save_pretrained",
        save_directory="x", selected_adapters=["default"],
        path_initial_model_for_weight_conversion=None,
    ),
    "LoraModel.set_adapter": method(adapted, "set_adapter", adapter_name=["default"]),
    "LoraModel.delete_adapter": method(adapted, "delete_adapter", **DEFAULT),
    "LoraModel.rename_adapter": method(adapted, "rename_adapter", old="default", new="b"),
    "LoraModel.set_scale": method(adapted, "set_scale", **DEFAULT, scale=2.0),
    "LoraModel.merge_adapter": method(
        adapted, "merge_adapter", adapter_names=["default"]
    ),
    "LoraModel.merge_and_unload": method(
        adapted, "merge_and_unload", adapter_names=["default"]
    ),
    "LoraModel.add_weighted_adapter": method(
        adapted, "add_weighted_adapter", adapters=["default"], weights=[1.0], adapter_name="w",
        combination_type="svd",
    ),
    "replace_linear": function(
        lora_ext.replace_linear, model=model(), target_modules=["0"], **LAYER,
        exclude_modules=None,
    ),
    "get_peft_config": function(lora_ext.get_peft_config, config_dict={"peft_type": "LORA"}),
    "load_peft_weights": function(
        lora_ext.load_peft_weights, model_id="x", key_mapping={"a": "b"}
    ),
    "convert_to_lora": function(
        lora_ext.convert_to_lora, model=adapted(), rank=2, **DEFAULT, progressbar=False
    ),
    "cast_mixed_precision_params": function(
        lora_ext.cast_mixed_precision_params, model=model(), dtype=torch.bfloat16
    ),
    "explain": function(lora_ext.explain, model=adapted(), tokens=8),
    "autotune": function(lora_ext.autotune, model=adapted(), tokens=[8], rounds=3),
    "lora_state_dict": function(lora_ext.lora_state_dict, model=adapted(), bias="none"),
    "mark_only_lora_as_trainable": function(
        lora_ext.mark_only_lora_as_trainable, model=adapted(), bias="none"
    ),
    "print_trainable_parameters": function(lora_ext.print_trainable_parameters, model=adapted()),
}  # fmt: skip
# What an argument takes of WRONG.
TAKEN = {
    "None": "key_mapping bias lora_bias rng_state padding_idx scale_grad_by_freq adapter_names "
    "scale task_type auto_mapping enable_lora exclude_modules "
    "path_initial_model_for_weight_conversion "
    "selected_adapters biases lora_biases rng_states",
    "text": "adapter adapter_name new model_id save_directory pretrained_model_name_or_path "
    "exclude_modules target_modules "
    "path_initial_model_for_weight_conversion",
    "float": "lora_alpha scale scaling scalings scale_grad_by_freq",
    "negative": "lora_alpha scale scaling scalings scale_grad_by_freq padding_idx",
    "list": "kernel_size enable_lora weights tokens scalings lora_linear_multi.dropout_p",
    "dict": "values peft_config",
    "tensor": "x z weight",
}
FIELDS_TAKEN = {
    "text": "peft_version base_model_name_or_path revision target_modules exclude_modules "
    "megatron_core",
    "float": "lora_alpha",
    "negative": "lora_alpha",
    "list": "layers_to_transform trainable_token_indices alora_invocation_tokens",
    # The last four are kept, and refused by a model.
    "dict": "auto_mapping alpha_pattern runtime_config unknown_fields megatron_config arrow_config "
    "kasa_config monteclora_config velora_config",
}
# Fields of a LoraConfig for which None is no value.
NEEDED = "peft_type inference_mode r lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
NEEDED += (
    "init_lora_weights use_dora qalora_group_size lora_bias ensure_weight_tying unknown_fields"
)
FIELDS = [
    name
    for name, field in LoraConfig.__dataclass_fields__.items()
    if field.init and name != "absent_fields"
]
SWEEP = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, call in CALLS.items()
    for argument in (FIELDS if name == "LoraConfig" else call.arguments)
]


def may_take(name: str, argument: str, value: str) -> bool:
    if name != "LoraConfig":
        return bool({argument, f"{name}.{argument}"} & set(TAKEN.get(value, "").split()))
    if value == "None":
        return argument not in NEEDED.split()
    return argument in FIELDS_TAKEN.get(value, "").split()


def state(on: Any) -> list[Any]:
    if not isinstance(on, nn.Module):
        return []
    return [repr(on), *((k, t.clone(), t.requires_grad) for k, t in on.state_dict().items())]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a == b if isinstance(a, str) else a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), SWEEP)
def test_wrong_argument_is_named(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in WRONG.items():
        call = CALLS[name]
        on, arguments = call.make(), copy.deepcopy(call.arguments)
        changed = [on, arguments.get("model")]
        before = [state(one) for one in changed]
        arguments[argument] = value
        try:
            (getattr(on, call.method) if call.method else on)(**arguments)
        except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
            if may_take(name, argument, key):  # and finds that it fits nothing
                continue
            message = str(error)
            assert argument.removesuffix("s") in message and "got" in message, (key, message)
            assert "incompatible function" not in message and len(message) < 1000, (key, message)
            unchanged = all(same(b, state(one)) for b, one in zip(before, changed, strict=True))
            assert unchanged or argument == "model", (key, message)
        else:
            assert may_take(name, argument, key), f"{key} is taken"


@pytest.mark.parametrize("name", CALLS)
def test_right_arguments_are_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what the others show is for the argument that is wrong."""
    monkeypatch.chdir(tmp_path)
    adapted().save_pretrained("x")
    if name == "autotune":
        pytest.skip("needs a GPU")
    call, arguments = CALLS[name], copy.deepcopy(CALLS[name].arguments)
    on = call.make()
    (getattr(on, call.method) if call.method else on)(**arguments)


ONE_NAME = {
    "set_adapter": lambda m: m.set_adapter("default"),
    "merge_adapter": lambda m: m.merge_adapter("default"),
    "merge_and_unload": lambda m: m.merge_and_unload(adapter_names="default"),
    "save_pretrained": lambda m: m.save_pretrained("folder", selected_adapters="default"),
    "add_weighted_adapter": lambda m: m.add_weighted_adapter("default", [1.0], "w"),
    "layer": lambda m: m.get_base_model()[0].merge(adapter_names="default"),
}


@pytest.mark.parametrize("call", ONE_NAME.values(), ids=ONE_NAME)
def test_one_name_is_a_list_of_one(
    call: Callable[[LoraModel], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call(adapted())


WIDTHS: dict[str, tuple[Callable[[], Any], str]] = {
    "linear": (lambda: linear()(T(3, 9)), r"lora_linear: x: got shape \[3, 9\], expected \[..., 4"),
    "dora": (
        lambda: lora.Linear(4, 4, r=2, lora_dropout=0.5, use_dora=True)(T(3, 9)),
        r"dora_linear: x: got shape \[3, 9\], expected \[..., 4\]",
    ),
    "integers": (lambda: linear()(T(3, 4).long()), "lora_linear: x: got dtype int64, expected flo"),
    "weight": (
        lambda: functional.lora_linear(T(3, 4), T(3, 9), None, **AB),
        r"weight: got shape \[3, 9\], expected \[out_features, 4\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), WIDTHS.values(), ids=WIDTHS)
def test_who_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


CONFIGS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"r": 2, "target_modules": ["0"]},
    "peft": lambda: peft.LoraConfig(r=2, target_modules=["0"], task_type="CAUSAL_LM"),
    "a mapping of lists": lambda: UserDict(r=np.int64(2), target_modules=UserList(["0"])),
    "of numpy": lambda: LoraConfig(
        r=np.int32(2), lora_alpha=np.float32(4), target_modules=np.array(["0"])
    ),
    "of keys": lambda: LoraConfig(r=2, target_modules={"0": 1}.keys()),
    "of a tuple": lambda: LoraConfig(r=2, target_modules=("0",), lora_dropout=np.float64(0.5)),
}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_configs_of_other_types(make: Callable[[], Any], tmp_path: Path) -> None:
    config = make()
    adapted_model = get_lora_model(model(), config)
    adapted_model.add_adapter("other", config)
    adapted_model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(model(), tmp_path).peft_config["default"]
    assert again.r == 2 and list(again.target_modules) == ["0"]
    assert peft.LoraConfig.from_pretrained(tmp_path).r == 2


def test_star_import_leaves_torchs_nn() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("from lora_ext import *", names)
    assert names["nn"] is nn and names["LoraConfig"] is LoraConfig


@pytest.mark.parametrize(
    ("name", "meant"), [("rank", "r"), ("alpha", "lora_alpha"), ("dora", "use_dora")]
)
def test_settings_by_another_name(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"^Linear: {name}: unknown, did you mean {meant}\?$"):
        lora_ext.nn.Linear.from_linear(nn.Linear(4, 4), **{name: 2})


def warn_of_an_embedding() -> None:
    lora_ext.nn.Embedding(4, 4, r=2, lora_dropout=0.1)


def warn_of_a_field() -> None:
    lora_ext.LoraConfig.from_dict({"peft_type": "LORA", "unheard_of": 3})


def warn_of_a_pattern() -> None:
    config = lora_ext.LoraConfig(r=2, target_modules=["0"], rank_pattern={"nowhere": 3})
    lora_ext.get_lora_model(nn.Sequential(nn.Linear(4, 4)), config)


@pytest.mark.parametrize("call", [warn_of_an_embedding, warn_of_a_field, warn_of_a_pattern])
def test_warnings_name_the_line_that_called(call: Callable[[], None]) -> None:
    with pytest.warns(UserWarning) as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]
