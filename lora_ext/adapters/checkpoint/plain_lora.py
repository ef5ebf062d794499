"""Adapters that PEFT has no keys for, written as plain ones that do the same."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator

from torch import Tensor

from lora_ext._patterns import compiled, is_plain
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import PREFIX
from lora_ext.adapters.config import LoraConfig
from lora_ext.nn import LoraLayer, ParamLayer


def plain_lora(
    model: AdaptedModel, adapter_name: str, config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of an adapter, with those of `MergedLinear` and of single projections of
    `MultiheadAttention` as adapters of the whole layer, of a multiple of the rank.

    Args:
        config, tensors: what would be saved otherwise; not changed.

    Raises:
        ValueError: an attention with kdim or vdim other than embed_dim, for which PEFT has no
            layer.
    """
    result, settings = dict(tensors), dict(_settings(model, adapter_name))
    converted = False
    for name, layer in model.layers_with(adapter_name):
        try:
            plain = layer.plain_parts(adapter_name)
        except ValueError as error:
            raise ValueError(f"save_pretrained: as_plain_lora: '{name}': {error}") from None
        if plain is None:
            continue
        converted = True
        for key in layer.peft_parameters(adapter_name):
            del result[f"{PREFIX}{name}.{key}"]
        for part, tensor in plain.items():
            result[f"{PREFIX}{name}.{layer.PEFT_NAMES[part]}"] = tensor
        settings[name] = (len(plain["lora_A"]), layer.adapters[adapter_name].scaling)
    if not converted:
        return config, result
    config = copy.deepcopy(config)
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, (r, scaling) in settings.items():
        key = only(name, settings)
        lora_alpha = scaling * (math.sqrt(r) if config.use_rslora else r)
        if r != config.r:
            config.rank_pattern[key] = r
        if lora_alpha != config.lora_alpha:
            config.alpha_pattern[key] = lora_alpha
    return config, result


def _settings(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, tuple[int, float]]]:
    """(name that patterns meet, (rank, scaling)) of all that the adapter is on."""
    for name, layer in model.layers_with(adapter_name):
        own = layer.adapters[adapter_name]
        for met in _names(name, layer):
            yield met, (own.r, own.scaling)


def _names(name: str, layer: LoraLayer) -> list[str]:
    return [f"{name}.{w}" for w in layer.WEIGHTS] if isinstance(layer, ParamLayer) else [name]


def only(name: str, names: Collection[str]) -> str:
    """A key of rank_pattern that matches this name and no other."""
    key = f"^{name}"
    if is_plain(key) and sum(bool(compiled("rank_pattern", key).match(n)) for n in names) == 1:
        return key
    return f"^{re.escape(name)}"
