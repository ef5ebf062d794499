"""Every call that PEFT has and that is here takes PEFT's arguments: by the same names, in the same
order, with defaults that mean the same; or it is in a table of what differs on purpose."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.tuners.lora.layer as peft_layers
import peft.tuners.trainable_tokens as peft_tokens
import peft.utils
import peft.utils.hotswap
import pytest

import lora_ext
from lora_ext import nn as lora
from lora_ext.nn.trainable_tokens import TrainableTokensLayer

TASKS = [name for name in lora_ext.__all__ if name.startswith(("PeftModelFor", "AutoPeft"))]
# PEFT's classes and what stands for them here.
CLASSES: dict[str, tuple[type, type]] = {
    "PeftModel": (peft.PeftModel, lora_ext.PeftModel),
    **{name: (getattr(peft, name), getattr(lora_ext, name)) for name in TASKS},
    "base_model": (peft.LoraModel, lora_ext.PeftModel),  # whose methods it has
    "LoraConfig": (peft.LoraConfig, lora_ext.LoraConfig),
    "PeftConfig": (peft.PeftConfig, lora_ext.PeftConfig),
    "BdLoraConfig": (peft.BdLoraConfig, lora_ext.BdLoraConfig),
    "LoraLayer": (peft_layers.LoraLayer, lora.LoraLayer),
    "Linear": (peft_layers.Linear, lora.Linear),
    "Embedding": (peft_layers.Embedding, lora.Embedding),
    "Conv1d": (peft_layers.Conv1d, lora.Conv1d),
    "Conv2d": (peft_layers.Conv2d, lora.Conv2d),
    "Conv3d": (peft_layers.Conv3d, lora.Conv3d),
    "MultiheadAttention": (peft_layers.MultiheadAttention, lora.MultiheadAttention),
    "ParamWrapper": (peft_layers.ParamWrapper, lora.ParamLayer),
    "TrainableTokensLayer": (peft_tokens.TrainableTokensLayer, TrainableTokensLayer),
}
CONFIGS = ("LoraConfig", "PeftConfig")
ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
MODULES = (peft, peft.utils, peft.helpers, peft.utils.hotswap)

# What differs on purpose: call, argument ("" for all of them), and the words with which the table
# of docs/peft.md says why.
DIFFERENT: dict[tuple[str, str], str] = {
    **{(f"{kind}.__init__", "peft_type"): "`PeftConfig` is `LoraConfig`" for kind in CONFIGS},
    ("LoraConfig.__init__", "runtime_config"): "`PeftConfig` is `LoraConfig`",
    ("PeftModelForTokenClassification.__init__", "peft_config"): "without a `peft_config`",
    ("PeftModelForCausalLM.prepare_inputs_for_generation", "task_ids"): "prompts",
    ("PeftModelForSeq2SeqLM.prepare_inputs_for_generation", "task_ids"): "prompts",
    ("base_model.__init__", ""): "`peft.LoraModel`, the tuner by itself",
    **{
        (f"{kind}.__init__", ""): "a layer's constructor"
        for kind in CLASSES
        if hasattr(CLASSES[kind][1], "forward") and not kind.startswith(("Peft", "base", "Conv"))
    },
    **{
        (f"{kind}.forward", "x"): "a layer's forward"
        for kind in (
            *("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
            *("ParamWrapper", "TrainableTokensLayer"),
        )
    },
}
# What of theirs has no counterpart, as a regular expression, and the same words.
LACKING: dict[str, str] = {
    r"PeftModel\w*\.(get_prompt|get_prompt_embedding_to_save)": "prompts",
    r"base_model\.(inject_adapter|get_model_config)": "`peft.LoraModel`, the tuner by itself",
    r"(LoraConfig|PeftConfig)\.(check_kwargs|push_to_hub)": "`check_kwargs`, `push_to_hub`",
    r"\w+\.(get|set)_base_weight": "layers have the base's `weight`",
    r"\w+\.(update_layer|resolve_lora_variant|\w+_init)": "`update_layer`",
    r"\w+\.unload_and_optionally_merge_module": "`update_layer`",
    r"ParamWrapper\.(get_param|get_delta_factors)": "`update_layer`",
    r"TrainableTokensLayer\.(forward_adapters|get_merged_weights)": "`update_layer`",
}


def differences(theirs: Signature, ours: Signature) -> Iterator[tuple[str, str]]:
    """(argument, what is different) for calls in PEFT's way. What theirs takes by any name, for
    calls of others, is not looked at."""
    positions = [p.name for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for place, (name, parameter) in enumerate(theirs.parameters.items()):
        if parameter.kind in ANY:
            continue
        own = ours.parameters.get(name)
        if own is None or own.kind in ANY:
            yield name, "is no argument"
        elif parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and positions[place:][:1] != [name]:
            yield name, f"is not at position {place}"
        elif parameter.default is not Parameter.empty and _plain(own) != _plain(parameter):
            yield name, f"has the default {own.default!r}, not {parameter.default!r}"


def _plain(parameter: Parameter) -> Any:
    """A default as it may be written: of an enum the text, of a factory that it is one, of a
    function its name."""
    default = parameter.default
    if inspect.isfunction(default):
        return default.__name__
    made = type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"
    return "<factory>" if made else getattr(default, "value", default)


def of_call(call: Callable[..., Any]) -> Signature:
    """Its signature without self or cls."""
    parameters = list(inspect.signature(call).parameters.values())
    return Signature([one for one in parameters if one.name not in ("self", "cls")])


def functions() -> Iterator[tuple[str, Any, Any]]:
    for module in MODULES:
        for name, theirs in vars(module).items():
            if inspect.isfunction(theirs) and hasattr(lora_ext, name):
                yield name, theirs, getattr(lora_ext, name)


def methods(kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Public ones that PEFT wrote, and the constructor; None for what is not here."""
    theirs, ours = CLASSES[kind]
    for name in dir(theirs):
        found = getattr(theirs, name)
        own = getattr(found, "__module__", None) or ""
        if not inspect.isroutine(found) or (name.startswith("_") and name != "__init__"):
            continue
        if own.startswith("peft.") or own == "transformers.utils.hub" or name == "__init__":
            yield f"{kind}.{name}", found, getattr(ours, name, None)


CALLS = {
    name: (theirs, ours)
    for name, theirs, ours in [*functions(), *(one for kind in CLASSES for one in methods(kind))]
}
PAIRS = {name: pair for name, pair in CALLS.items() if pair[1] is not None}


def test_all_of_them_are_looked_at() -> None:
    """What the table below is made of: were it empty, nothing would be compared."""
    some = """get_peft_model inject_adapter_in_model set_peft_model_state_dict hotswap_adapter
        rescale_adapter_scale PeftModel.from_pretrained PeftModel.set_adapter
        PeftModelForCausalLM.forward LoraConfig.from_pretrained LoraConfig.from_peft_type
        LoraConfig.__init__ base_model.add_weighted_adapter Linear.merge Linear.unmerge
        Linear.get_delta_weight Linear.set_adapter Linear.enable_adapters Linear.scale_layer
        Linear.unscale_layer Linear.set_scale Linear.delete_adapter Linear.set_requires_grad
        Conv2d.merge Embedding.forward TrainableTokensLayer.merge PeftModel.push_to_hub"""
    assert set(some.split()) <= PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_are_pefts(name: str) -> None:
    theirs, ours = map(of_call, PAIRS[name])
    found = {
        argument: what
        for argument, what in differences(theirs, ours)
        if (name, "") not in DIFFERENT and (name, argument) not in DIFFERENT
    }
    assert found == {}, f"{name}{ours}, in PEFT {theirs}"


def test_what_is_not_here_is_known() -> None:
    missing = [name for name, (_, ours) in CALLS.items() if ours is None]
    assert [name for name in missing if not any(re.fullmatch(r, name) for r in LACKING)] == []
    assert [r for r in LACKING if not any(re.fullmatch(r, name) for name in missing)] == []


@pytest.mark.parametrize(("name", "argument"), DIFFERENT, ids=map(" ".join, DIFFERENT))
def test_what_differs_on_purpose_does(name: str, argument: str) -> None:
    theirs, ours = map(of_call, PAIRS[name])
    found = dict(differences(theirs, ours))
    assert found if argument == "" else argument in found


@pytest.mark.parametrize("words", sorted({*DIFFERENT.values(), *LACKING.values()}))
def test_the_docs_say_what_differs(words: str) -> None:
    text = Path(__file__).parents[1].joinpath("docs/peft.md").read_text()
    table = text.partition("## Different on purpose")[2].partition("\n## ")[0]
    assert words in table


@pytest.mark.parametrize("name", [name for name in PAIRS if (name, "") not in DIFFERENT])
def test_another_name_place_or_default_would_be_noticed(name: str) -> None:
    """Each argument of ours renamed, taken by keyword alone, and with another default."""
    theirs, ours = map(of_call, PAIRS[name])
    for argument, parameter in theirs.parameters.items():
        if parameter.kind in ANY or (name, argument) in DIFFERENT:
            continue
        own = ours.parameters[argument]
        changes: list[dict[str, Any]] = [{"name": "renamed"}]
        if parameter.default is not Parameter.empty:
            changes.append({"default": "another"})
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            changes.append({"kind": Parameter.KEYWORD_ONLY})
        for change in changes:
            others = [one for one in ours.parameters.values() if one is not own]
            others.insert(list(ours.parameters).index(argument), own.replace(**change))
            wrong = Signature(sorted(others, key=lambda one: one.kind))
            assert argument in dict(differences(theirs, wrong)), (argument, change)
