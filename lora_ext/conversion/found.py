"""The layers of an adapter that is to be converted, in a model of ours or of PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import PREFIX, around_others, name_in_file, saved_in_file
from lora_ext.adapters.inject import adapted
from lora_ext.adapters.names import named_modules
from lora_ext.arguments import check_known, warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.sharded import has_shards

WHERE = "convert_to_lora"


class Found(NamedTuple):
    """An adapter in a model."""

    prefix: str  # of its keys
    base: nn.Module
    config: Any  # its config, ours or PEFT's; None of layers that were put in by hand
    layers: dict[str, Any]  # by their names in the base
    keys: dict[str, str]  # their names in files
    saved: dict[str, Tensor]  # of modules that are saved whole, by key


def found_in(model: nn.Module, adapter_name: str) -> Found:
    if has_shards(model):
        raise ValueError(
            f"{WHERE}: model: is divided between processes (FSDP2, tensor parallel), expected a "
            "whole one; save the adapter, and convert it in one process"
        )
    plain = _peft_layer()
    if plain is not None and not any(isinstance(m, LoraLayer) for m in model.modules()):
        return _found_in_pefts(model, adapter_name, plain)
    try:
        owner, without_prefix = adapted(model, WHERE)
    except TypeError:  # layers of their own
        layers = {n: m for n, m in named_modules(model) if isinstance(m, LoraLayer)}
        known = {name: None for layer in layers.values() for name in layer.adapters}
        if known:
            check_known(WHERE, "adapter_name", [adapter_name], known)
        layers = {n: layer for n, layer in layers.items() if adapter_name in layer.adapters}
        return Found("", model, None, layers, {n: n for n in layers}, {})
    check_known(WHERE, "adapter_name", [adapter_name], owner.peft_config)
    owner.check_not_offloaded(adapter_name, WHERE)
    prefix = "" if without_prefix else PREFIX
    saved = {
        prefix + key.removeprefix(PREFIX): tensor.detach().clone()
        for key, tensor in saved_in_file(owner, adapter_name)
    }
    base, config = owner.get_base_model(), owner.peft_config[adapter_name]
    return Found(prefix, base, config, *_layers(owner, adapter_name), saved)


def _layers(owner: AdaptedModel, adapter_name: str) -> tuple[dict[str, Any], dict[str, str]]:
    mine: list[tuple[str, Any]] = list(owner.layers_with(adapter_name))
    around = around_others(mine)
    mine += [(n, one) for n, one in owner.token_layers() if adapter_name in one.adapters]
    return dict(mine), {name: name_in_file(name, around) for name, _ in mine}


def _peft_layer() -> Any:
    """What PEFT's layers derive from, if it is imported."""
    return getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)


def _found_in_pefts(model: Any, adapter_name: str, kind: Any) -> Found:
    configs = getattr(model, "peft_config", None)
    config = None
    if isinstance(configs, Mapping):
        check_known(WHERE, "adapter_name", [adapter_name], configs)
        config = configs[adapter_name]
    named: list[tuple[str, Any]] = list(named_modules(model))
    prefix = PREFIX if any(name.startswith(PREFIX) for name, _ in named) else ""
    named = [(name.removeprefix(prefix), module) for name, module in named]
    layers = {name: module for name, module in named if isinstance(module, kind)}
    saved = {
        f"{prefix}{name}.{key}": tensor.detach().clone()
        for name, module in named
        if hasattr(module, "original_module")
        and adapter_name in getattr(module, "modules_to_save", ())
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }
    base = model.get_submodule(PREFIX.rstrip(".")) if prefix else model
    return Found(prefix, base, config, layers, {name: name for name in layers}, saved)


def check_convertible(found: Found, adapter_name: str) -> None:
    unsupported = _unsupported(found, adapter_name)
    if unsupported:
        raise TypeError(
            f"{WHERE}: Some module types on this model do not support LoRA conversion: "
            f"{', '.join(unsupported)}, expected linear layers whose adapter adds to the weight"
        )
    if not found.layers:
        raise TypeError(f"{WHERE}: Could not detect any layer that supports LoRA conversion.")
    settings = [getattr(layer, "adapters", {}).get(adapter_name) for layer in found.layers.values()]
    for held in (found.config, *settings):
        for field in ("bias", "lora_bias"):
            value = getattr(held, field, "none")
            if value not in ("none", False):
                raise ValueError(
                    f"{WHERE}: {field}: got {value!r} of '{adapter_name}', expected none: what is "
                    "converted is what it adds to weights"
                )
    if getattr(found.config, "peft_type", None) == "LORA" and not getattr(
        found.config, "use_dora", False
    ):
        warn(
            f"{WHERE}: Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is "
            "typically no need for that, but to have a smaller rank"
        )


def _unsupported(found: Found, adapter_name: str) -> list[str]:
    """The classes of what cannot be converted."""
    return sorted(
        {
            repr(type(layer))
            for layer in found.layers.values()
            if not layer.supports_lora_conversion(adapter_name)
            or (not isinstance(layer, LoraLayer) and _scales(layer, adapter_name))
        }
    )


def _scales(layer: Any, adapter_name: str) -> bool:
    """Whether one of PEFT's LoRA layers has a variant, such as DoRA, which its delta leaves out."""
    return getattr(layer, "lora_variant", {}).get(adapter_name) is not None
