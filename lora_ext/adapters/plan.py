"""What a config means for a model, found before anything is changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import ALL_LINEAR
from lora_ext.adapters.layers import adaptable, can_be_adapted
from lora_ext.adapters.modules_to_save import ModulesToSave
from lora_ext.adapters.patterns import CODE_SECONDS, time_limit
from lora_ext.adapters.target_parameters import TargetedModule, find_parameters
from lora_ext.adapters.targets import find_targets, has_targets, matches, saved_modules
from lora_ext.adapters.ties import shared_parameters, tied_to_embedding
from lora_ext.errors import NotBuiltError
from lora_ext.nn import AdapterSettings, Embedding, LoraLayer
from lora_ext.nn.arguments import short
from lora_ext.nn.init import mutates_weight


class PlannedLayer(NamedTuple):
    """A layer, and the adapter that it is to get."""

    name: str
    layer: LoraLayer
    settings: AdapterSettings


class Plan(NamedTuple):
    """What a config means for a model."""

    names: list[str]  # of the target modules
    parameters: list[str]  # names of the target parameters
    layers: dict[int, PlannedLayer]  # by the id of the module that the layer stands for
    saved: dict[str, nn.Module]  # modules to save
    tied: dict[str, str]  # those whose copies get the weight of another's copy: that one's name


def adapter_settings(
    config: LoraConfig, name: str, autocast_adapter_dtype: bool
) -> AdapterSettings:
    """What a config says of the module called `name`."""
    r, lora_alpha = config.settings_for(name)
    return AdapterSettings(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        init_lora_weights=config.init_lora_weights,
        use_dora=config.use_dora,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def resolved(config: LoraConfig, plan: Plan) -> LoraConfig:
    """A copy that names what it stands for, so that a file of it does not depend on the model."""
    config = copy.deepcopy(config)
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        config.target_modules = list(plan.names)
    saved = saved_modules(config)
    if plan.tied:  # as PEFT names them: the embedding stands for what is tied to it
        source = next(iter(plan.tied.values()))
        saved = [name for name in saved if not any(matches(tied, [name]) for tied in plan.tied)]
        saved += [source] if source not in saved else []
    config.modules_to_save = saved or None
    return config


def make_plan(model: nn.Module, config: LoraConfig, autocast_adapter_dtype: bool) -> Plan:
    """Finds what a config adapts.

    Raises:
        TypeError: a target module is of a kind that has no adapters.
        ValueError: nothing matches target_modules or modules_to_save, a setting is out of range, or
            init_lora_weights would change a weight that several modules share.
        NotBuiltError: ensure_weight_tying of adapters.
    """
    with time_limit(CODE_SECONDS, sum(1 for _ in model.modules())):
        return _make_plan(model, config, autocast_adapter_dtype)


def _make_plan(model: nn.Module, config: LoraConfig, autocast_adapter_dtype: bool) -> Plan:
    config.validate()
    names = []
    if has_targets(model, config) or not config.target_parameters:
        names = find_targets(model, config, can_be_adapted, (LoraLayer, ModulesToSave))
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[int, PlannedLayer] = {}
    for name in names:
        module = modules[name]
        if id(module) not in layers:  # else it is registered under another name as well
            settings = adapter_settings(config, name, autocast_adapter_dtype)
            layers[id(module)] = PlannedLayer(name, adaptable(name, module), settings)
    targeted = find_parameters(model, config, names) if config.target_parameters else []
    for one in targeted:
        settings = _common_settings(config, one, autocast_adapter_dtype)
        layers[id(one.module)] = PlannedLayer(one.name, one.layer, settings)
    _check_initialisation(model, config, list(layers.values()))
    to_save = frozenset(saved_modules(config))
    saved = {name: module for name, module in modules.items() if name and matches(name, to_save)}
    if config.modules_to_save and not saved:
        raise ValueError(
            f"LoraConfig: modules_to_save: {short(config.modules_to_save)} matches no module"
        )
    tied = _tied(model, names, saved) if config.ensure_weight_tying else {}
    for name in (*tied.values(), *tied):
        saved.setdefault(name, modules[name])
    parameters = [f"{one.name}.{part}" for one in targeted for part in one.parameters]
    return Plan(names, parameters, layers, saved, tied)


def _check_initialisation(
    model: nn.Module, config: LoraConfig, layers: Sequence[PlannedLayer]
) -> None:
    """ValueError where the initial product would be taken out of a shared weight: once for each
    layer, and for modules that add no such product."""
    if not mutates_weight(config.init_lora_weights):
        return
    shared = shared_parameters(model)
    names = [
        name
        for name, layer, _ in layers
        if not isinstance(layer, Embedding)  # never changed
        and any(id(weight) in shared for weight in layer.merged_parameters(()).values())
    ]
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise ValueError(
            f"LoraConfig: init_lora_weights: got {config.init_lora_weights!r}, which changes the "
            f"weight of '{names[0]}'{more}, but other modules share it (tied embeddings, "
            "layer_replication); expected True, 'gaussian' or 'orthogonal', or these modules in "
            "exclude_modules"
        )


def _common_settings(
    config: LoraConfig, one: TargetedModule, autocast_adapter_dtype: bool
) -> AdapterSettings:
    """What a config says of the parameters of one module: the same of each."""
    names = [f"{one.name}.{part}" for part in one.parameters]
    settings = [adapter_settings(config, name, autocast_adapter_dtype) for name in names]
    for name, other in zip(names, settings, strict=True):
        if other != settings[0]:
            raise ValueError(
                f"LoraConfig: rank_pattern, alpha_pattern: '{name}' has r={other.r} and lora_alpha="
                f"{other.lora_alpha}, '{names[0]}' has r={settings[0].r} and lora_alpha="
                f"{settings[0].lora_alpha}, expected the same for all parameters of one module"
            )
    return settings[0]


def _tied(model: nn.Module, names: list[str], saved: dict[str, nn.Module]) -> dict[str, str]:
    """`Plan.tied` with ensure_weight_tying."""
    tied = tied_to_embedding(model)
    together = {*tied, *tied.values()}
    adapted = sorted(together & set(names))
    if adapted:
        raise NotBuiltError(
            f"LoraConfig: ensure_weight_tying: got True with target_modules that mean {adapted}: "
            "tying adapters is not built; name these in modules_to_save, or give each an adapter "
            "of its own with ensure_weight_tying=False"
        )
    if together & saved.keys():
        return tied
    warnings.warn(
        "LoraConfig: ensure_weight_tying: modules_to_save names nothing that is tied to the input "
        "embedding",
        stacklevel=2,
    )
    return {}
