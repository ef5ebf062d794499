"""Our classes in the places of PEFT's, in every module of PEFT that has a name of them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner

import lora_ext
import lora_ext.adapters.also_peft
from lora_ext import nn
from lora_ext.nn import token_wrappers, trainable_tokens

OTHERS = peft.PeftConfig  # ours are none
# PEFT's object, as module:name, and what stands for it: everything public that has a counterpart.
NAMES = (
    *("LoraConfig", "get_peft_model", "PeftModel", "PeftConfig"),
    *("get_peft_model_state_dict", "set_peft_model_state_dict", "inject_adapter_in_model"),
    *("prepare_model_for_kbit_training", "get_layer_status", "get_model_status"),
    *("PeftModelForCausalLM", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification"),
    *("PeftModelForTokenClassification", "PeftModelForQuestionAnswering"),
    *("PeftModelForFeatureExtraction", "get_base_model_state_dict", "set_base_model_state_dict"),
    *("replace_lora_weights_loftq", "BdLoraConfig"),
)
# Of which a config, or a model, of another kind than LoRA stays PEFT's.
BY_CONFIG = ("get_peft_model", "inject_adapter_in_model")
BY_MODEL = (
    *("get_peft_model_state_dict", "set_peft_model_state_dict", "get_layer_status"),
    *("get_model_status", "get_base_model_state_dict", "set_base_model_state_dict"),
)
ELSEWHERE = {
    "peft.helpers": ("check_if_peft_model", "rescale_adapter_scale"),
    "peft.utils.hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
}
LAYERS = {
    "peft.tuners.lora.layer": {
        "LoraLayer": nn.LoraLayer,
        "Linear": nn.Linear,
        "Embedding": nn.Embedding,
        "Conv1d": nn.Conv1d,
        "Conv2d": nn.Conv2d,
        "Conv3d": nn.Conv3d,
        "MultiheadAttention": nn.MultiheadAttention,
        "ParamWrapper": nn.ParamLayer,
    },
    "peft.tuners.tuners_utils": {"BaseTunerLayer": nn.LoraLayer},
}
# Which also other kinds of adapters have, whose own stay PEFT's: tests ask for either.
SHARED = {
    "peft.utils.other": {
        "ModulesToSaveWrapper": nn.modules_to_save.ModulesToSave,
        "TrainableTokensWrapper": token_wrappers.TrainableTokensWrapper,
    },
    "peft.tuners.trainable_tokens.layer": {
        "TrainableTokensLayer": trainable_tokens.TrainableTokensLayer
    },
}


def swap() -> Callable[[], None]:
    """Puts what `lora_ext` has into `peft` and its modules, from which tests import it.

    Returns:
        What takes it out again: PEFT's own code is to find its own, for other kinds of adapters.
    """
    for module in pkgutil.walk_packages(peft.__path__, "peft."):
        if "bnb" not in module.name:
            _import(module.name)
    ours: dict[int, Any] = {}
    for name in NAMES:
        ours[id(getattr(peft, name))] = _for_lora(getattr(peft, name), getattr(lora_ext, name))
    for where, names in ELSEWHERE.items():
        for name in names:
            ours[id(getattr(sys.modules[where], name))] = getattr(lora_ext, name)
    for where, layers in LAYERS.items():
        for name, layer in layers.items():
            ours[id(getattr(sys.modules[where], name))] = layer
    for where, layers in SHARED.items():
        for name, layer in layers.items():
            theirs = getattr(sys.modules[where], name)
            ours[id(theirs)] = _Either(name, (), {"kinds": (theirs, layer)})
    before: list[tuple[Any, str, Any]] = []
    for where, module in list(sys.modules.items()):
        if where == "peft" or where.startswith("peft."):
            for name, value in list(vars(module).items()):
                if id(value) in ours and not name.startswith("__"):
                    before.append((module, name, value))
                    setattr(module, name, ours[id(value)])

    def restore() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return restore


class _Either(type):
    """Of classes whose instances are those of any of `kinds`."""

    def __instancecheck__(cls, instance: object) -> bool:
        kinds: tuple[type, ...] = cls.kinds  # type: ignore[attr-defined]
        return isinstance(instance, kinds)


def _for_lora(theirs: Any, own: Any) -> Any:
    """Our function; where it is asked for another kind of adapter than LoRA, PEFT's."""
    if own.__name__ in BY_CONFIG or theirs.__name__ in BY_CONFIG:

        @functools.wraps(own)
        def by_config(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            return (theirs if any(isinstance(one, OTHERS) for one in given) else own)(
                *args, **kwargs
            )

        return by_config
    if theirs.__name__ in BY_MODEL:

        @functools.wraps(own)
        def by_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            tuner = getattr(model, "base_model", None)
            configs = getattr(model, "peft_config", None)  # of adapters that were injected
            is_theirs = type(model).__module__.startswith("peft.") or isinstance(tuner, BaseTuner)
            if isinstance(configs, dict):
                is_theirs |= any(isinstance(one, OTHERS) for one in configs.values())
            return (theirs if is_theirs else own)(model, *args, **kwargs)

        return by_model
    return own


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:  # of what is not installed
        pass
