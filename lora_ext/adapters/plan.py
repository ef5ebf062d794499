"""What a config means for a model, found before anything is changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lora_ext._patterns import CODE_SECONDS, compiled, in_time
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import ALL_LINEAR, check_built
from lora_ext.adapters.experts import warn_of_unreached, with_experts
from lora_ext.adapters.names import (
    ORIGINAL,
    ends_in,
    exact_targets,
    has_wrapper_level,
    named_modules,
    plain_name,
)
from lora_ext.adapters.target_parameters import TargetedModule, find_parameters
from lora_ext.adapters.targets import (
    find_targets,
    has_targets,
    matches,
    saved_modules,
    warn_of_unused_names,
    warn_of_unused_patterns,
)
from lora_ext.adapters.ties import shared_parameters, tied_to_embedding
from lora_ext.adapters.tokens import PlannedTokens, check_apart, plan_tokens
from lora_ext.arguments import short, warn
from lora_ext.nn import AdapterSettings, Embedding, Linear, LoraLayer
from lora_ext.nn.adapter import VARIANTS, variant_of
from lora_ext.nn.calibrated import left_at
from lora_ext.nn.init import mutates_weight
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.kinds import can_be_adapted, layer_for
from lora_ext.nn.linear import LinearBase
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TrainableTokensWrapper
from lora_ext.quant.kinds import quantized_kind

# From so many on the ends of names are written instead of names, as in PEFT's files.
MANY_NAMES = 400
# The names of modules with an embedding's weight by which PEFT sees that they are to be tied.
_EMBEDDINGS = ("embed_tokens", "lm_head")


class PlannedLayer(NamedTuple):
    """A layer, and the adapter that it is to get."""

    name: str
    layer: LoraLayer
    settings: AdapterSettings


class Plan(NamedTuple):
    """What a config means for a model."""

    config: LoraConfig  # with target_parameters where the model has experts stacked
    names: list[str]  # of the target modules
    parameters: list[str]  # names of the target parameters
    layers: dict[int, PlannedLayer]  # by the id of the module that the layer stands for
    saved: dict[str, nn.Module]  # modules to save
    tied: dict[str, str]  # those whose copies get the weight of another's copy: that one's name
    tokens: dict[str, PlannedTokens]  # modules of whose weight rows are trained
    tied_layers: Mapping[str, str] = {}  # layers with the adapter of an embedding: that one's name


def adapter_settings(
    config: LoraConfig, name: str, autocast_adapter_dtype: bool
) -> AdapterSettings:
    """What a config says of the module called `name`."""
    r, lora_alpha = config.settings_for(name)
    of_A, of_B = config.use_bdlora.blocks_of(name) if config.use_bdlora else (1, 1)
    return AdapterSettings(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        init_lora_weights=config.init_lora_weights,
        **{flag: getattr(config, flag) for flag in VARIANTS},
        autocast_adapter_dtype=autocast_adapter_dtype,
        alora_invocation_tokens=tuple(config.alora_invocation_tokens or ()) or None,
        blocks_of_lora_A=of_A,
        blocks_of_lora_B=of_B,
        **(config.loftq_config or {}),
        **(config.lora_ga_config.settings() if config.lora_ga_config else {}),
    )


def with_plain_names(config: LoraConfig) -> LoraConfig:
    """The config, its names without the levels of torch.compile: they may have been read off a
    model that was compiled, by whoever wrote them."""
    plain: dict[str, Any] = {}
    for field in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        names = getattr(config, field)
        if names and not isinstance(names, str):
            if has_wrapper_level("\n".join(names)):  # all at once: a hostile file has very many
                plain[field] = [plain_name(name) for name in names]
    return replace(config, **plain) if plain else config


def resolved(model: nn.Module, plan: Plan) -> LoraConfig:
    """The plan's config with what it stands for by name, so that a file of it does not depend on
    the model."""
    config = copy.deepcopy(plan.config)
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        many = len(plan.names) >= MANY_NAMES
        config.target_modules = exact_targets(model, plan.names, shortest=many)
        if isinstance(config.target_modules, str):  # which these cannot go with, and includes them
            config.layers_to_transform = config.layers_pattern = None
    elif _means_what_others_save(model, config, targets):
        config = only_on(model, config, plan.names)
    if _means_what_others_save(model, config, config.target_parameters):
        config.target_parameters = list(plan.parameters)
    if plan.tied_layers:
        together = {*plan.tied_layers, *plan.tied_layers.values()}
        if any(matches(name, config.exclude_modules, "exclude_modules") for name in together):
            config = only_on(model, config, plan.names)  # the tie means them all the same
        _name_the_source(config, plan.tied_layers)
    saved = saved_modules(config)
    if _saves_what_others_save(model, saved, plan.saved):
        saved = list(plan.saved)
    if plan.tied:  # as PEFT names them: the embedding stands for what is tied to it
        source = next(iter(plan.tied.values()))
        saved = [name for name in saved if not any(matches(tied, [name]) for tied in plan.tied)]
        saved += [source] if source not in saved else []
    config.modules_to_save = saved or None
    config.fan_in_fan_out = _is_transposed(config, [one.layer for one in plan.layers.values()])
    return config


def _is_transposed(config: LoraConfig, layers: Iterable[LoraLayer]) -> bool:
    """fan_in_fan_out by what the layers are, as PEFT writes it: who has the base's tensors alone
    cannot tell a square Conv1D from a linear layer. Of both kinds together it is True, where PEFT's
    is that of the last one."""
    linear = [one for one in layers if isinstance(one, LinearBase)]
    # A quantized layer computes y = W x, also where it took a Conv1D's place.
    kinds = [getattr(one._modules.get("base_layer"), "source_cls", None) for one in linear]
    stored = [one.fan_in_fan_out for one in linear]
    stored += [kind.__name__ == "Conv1D" for kind in kinds if isinstance(kind, type)]
    if not stored or config.target_parameters:  # which do not go with it
        return config.fan_in_fan_out
    return any(stored)


def _name_the_source(config: LoraConfig, tied: Mapping[str, str]) -> None:
    """Makes target_modules name the embedding, which stands for what is tied to it, as in PEFT; and
    where PEFT would not know its name for that of one, a layer that is tied to it: all of them
    where it knows none, which have adapters of their own there."""
    targets = config.target_modules
    if not isinstance(targets, str):
        targets = [one for one in targets or () if not any(matches(head, [one]) for head in tied)]
    targets = _naming(targets, [next(iter(tied.values()))])
    if not _means_embedding(targets):
        known = [name for name in tied if _means_embedding(_naming(targets, [name]))]
        targets = _naming(targets, sorted(known, key=lambda name: name.count("."))[:1] or tied)
    config.target_modules = targets


def _naming(targets: str | list[str], names: Iterable[str]) -> str | list[str]:
    """Target_modules that also mean these."""
    for name in names:
        if not matches(name, targets):
            exactly = f"^{re.escape(name)}$"
            targets = f"(?:{targets}|{exactly})" if isinstance(targets, str) else [*targets, name]
    return targets


def _means_embedding(targets: str | list[str]) -> bool:
    """Whether PEFT sees in target_modules that layers are to be tied: it asks a regular expression
    about bare names."""
    if isinstance(targets, str):
        return any(matches(name, targets) for name in _EMBEDDINGS)
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in targets)


def only_on(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> LoraConfig:
    """The config with target_modules that mean these alone, and nothing to restrict them."""
    config = copy.deepcopy(config)
    config.target_modules = exact_targets(model, names, shortest=True)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _means_what_others_save(
    model: nn.Module, config: LoraConfig, targets: str | Collection[str] | None
) -> bool:
    """Whether these also mean modules, or parameters, that the config does not adapt here only
    because they are in a module that another adapter saves whole."""
    own = [compiled("modules_to_save", pattern) for pattern in saved_modules(config)]
    meant = targets if isinstance(targets, str) else frozenset(targets or ())
    for name, module in named_modules(model) if meant else ():
        if f"{ORIGINAL}." not in f"{name}.":
            continue
        name = name.replace(ORIGINAL, "")
        names = (name, *(f"{name}.{part}" for part in module._parameters))
        if any(matches(one, meant) for one in names) and not any(one.match(name) for one in own):
            return True
    return False


def _saves_what_others_save(model: nn.Module, named: Sequence[str], saved: Collection[str]) -> bool:
    """Whether names of modules to save also mean modules that are not saved here only because they
    are in a module that another adapter saves whole."""
    is_named = ends_in(named)
    for name, _ in named_modules(model) if named else ():
        if f"{ORIGINAL}." not in f"{name}.":
            continue
        name = name.replace(ORIGINAL, "")
        if is_named(name) and not f"{name}.".startswith(tuple(f"{s}." for s in saved)):
            return True
    return False


def make_plan(model: nn.Module, config: LoraConfig, autocast_adapter_dtype: bool) -> Plan:
    """Finds what a config adapts.

    Raises:
        TypeError: a target module is of a kind that has no adapters, or a module to save has some.
        ValueError: nothing matches target_modules or modules_to_save, a setting is out of range, or
            init_lora_weights would change a weight that several modules share.
        NotBuiltError: a field that asks for what is not built.
    """
    names = sum(1 for _ in model.modules())
    return in_time(CODE_SECONDS, names, lambda: _make_plan(model, config, autocast_adapter_dtype))


def _make_plan(model: nn.Module, config: LoraConfig, autocast_adapter_dtype: bool) -> Plan:
    config.validate()
    check_built(config.unknown_fields | vars(config))
    given = config = with_plain_names(config)
    config = with_experts(model, config)
    names = []
    if has_targets(model, config) or not config.target_parameters:
        kinds = (LoraLayer, ModulesToSave, TrainableTokensWrapper)
        required = not config.target_parameters
        names = find_targets(model, config, can_be_adapted, kinds, required)
    tied_layers = _tied_layers(model, config, names)
    names += [name for name in (*tied_layers.values(), *tied_layers) if name not in names]
    modules = dict(named_modules(model, remove_duplicate=False))
    layers: dict[int, PlannedLayer] = {}
    for name in dict.fromkeys(names):
        module = modules[name]
        if id(module) not in layers:  # else it is registered under another name as well
            settings = adapter_settings(config, name, autocast_adapter_dtype)
            layers[id(module)] = PlannedLayer(name, layer_for(name, module), settings)
    targeted = find_parameters(model, config, names) if config.target_parameters else []
    for one in targeted:
        settings = _settings_of_parameters(config, one, autocast_adapter_dtype)
        layers[id(one.module)] = PlannedLayer(one.name, one.layer, settings)
    _check_initialisation(model, config, list(layers.values()))
    _check_tied_layers(config, tied_layers, layers)
    saved = _find_saved(modules, config)
    _check_nested(list(layers.values()), [*names, *saved])
    if config.modules_to_save and not saved:
        raise ValueError(
            f"LoraConfig: modules_to_save: {short(config.modules_to_save)} matches no module"
        )
    for name, module in saved.items():
        trained = (LoraLayer, TrainableTokensWrapper)
        if any(isinstance(part, trained) for part in module.modules()):
            raise TypeError(
                f"LoraConfig: modules_to_save: '{name}' has adapters, or trained rows, expected a "
                "module without: its copy would be trained beside them"
            )
        if any(quantized_kind(part) is not None for part in module.modules()):
            raise TypeError(
                f"LoraConfig: modules_to_save: '{name}' has a quantized weight, which cannot be "
                "trained, expected a module without: name it in target_modules, or leave it out "
                "when the model is quantized (exclude_modules of quantize_, llm_int8_skip_modules "
                "of a quantization_config)"
            )
    tied = _tied(model, config, names, saved)
    for name in (*tied.values(), *tied):
        saved.setdefault(name, modules[name])
    tokens = plan_tokens(model, modules, config, autocast_adapter_dtype)
    check_apart(tokens, names, saved)
    parameters = [f"{one.name}.{part}" for one in targeted for part in one.parameters]
    if names:
        warn_of_unused_names("LoraConfig", config.target_modules, modules)
    warn_of_unused_patterns(config, [*names, *parameters])
    warn_of_unreached(model, given, names, parameters)
    return Plan(config, names, parameters, layers, saved, tied, tokens, tied_layers)


def _find_saved(modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    """The modules to save; what is inside one is saved with it."""
    is_named, inside = ends_in(saved_modules(config)), None
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if is_named(name):  # "norm": all "..._norm", as in PEFT
            found[name] = module
        if name in found or isinstance(module, ModulesToSave | KeptBase):
            inside = f"{name}."
    return found


def _check_nested(layers: Sequence[PlannedLayer], inside: Collection[str]) -> None:
    """ValueError where a layer that keeps its base has another layer, or a module to save, in it:
    PEFT's files have no name for that."""
    for name, layer, _ in layers:
        if not isinstance(layer, KeptBase):
            continue
        nested = [one for one in inside if one.startswith(f"{name}.")]
        if nested:
            raise ValueError(
                f"LoraConfig: target_modules, modules_to_save: '{nested[0]}' is inside of "
                f"'{name}', which is adapted as a whole; leave one of them out, with "
                "exclude_modules say"
            )


def _check_initialisation(
    model: nn.Module, config: LoraConfig, layers: Sequence[PlannedLayer]
) -> None:
    """ValueError where the initial product would be taken out of a shared weight: once for each
    layer, and for modules that add no such product."""
    kind = config.init_lora_weights
    if not mutates_weight(kind):
        return
    if kind == "lora_ga" and config.lora_ga_config is None:
        if any(left_at(layer, kind) is not None for _, layer, _ in layers):
            raise ValueError(
                "LoraConfig: lora_ga_config: got None, but layers have gradients for 'lora_ga', "
                "expected a LoraGAConfig: lora_ga_config must be provided"
            )
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


def _settings_of_parameters(
    config: LoraConfig, one: TargetedModule, autocast_adapter_dtype: bool
) -> AdapterSettings:
    """What a config says of the parameters of one module, each by itself."""
    settings = {
        part: adapter_settings(config, f"{one.name}.{part}", autocast_adapter_dtype)
        for part in one.parameters
    }
    # The layer's own are what `set_scale` multiplies, and zero would make all of it zero.
    first = next((own for own in settings.values() if own.scaling), settings[one.parameters[0]])
    others = {part: (own.r, own.lora_alpha) for part, own in settings.items() if own != first}
    return replace(first, weights=others)


def _tied_layers(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> dict[str, str]:
    """`Plan.tied_layers`: all that share the embedding's weight, if one of them is a target."""
    if not config.ensure_weight_tying:
        return {}
    tied = tied_to_embedding(model)
    return tied if {*tied, *tied.values()} & set(names) else {}


def _check_tied_layers(
    config: LoraConfig, tied: Mapping[str, str], layers: Mapping[int, PlannedLayer]
) -> None:
    """ValueError where adapters of modules with one weight cannot be one adapter."""
    planned = {one.name: one for one in layers.values()}
    where = "LoraConfig: ensure_weight_tying: got True"
    for name, source in tied.items():
        other, embedding = planned[name], planned[source]
        plain = isinstance(other.layer, Embedding) or (
            isinstance(other.layer, Linear) and not other.layer.fan_in_fan_out
        )
        if not plain or not isinstance(embedding.layer, Embedding):
            raise ValueError(
                f"{where} with target_modules that mean '{source}' and '{name}', which share one "
                "weight, expected an embedding and linear layers or other embeddings"
            )
        if other.settings.scaling != embedding.settings.scaling or (
            other.settings.r != embedding.settings.r
        ):
            raise ValueError(
                f"{where}, but rank_pattern or alpha_pattern give '{source}' and '{name}', which "
                "share one weight and one adapter, other ranks or scalings; expected the same"
            )
    kind = config.init_lora_weights
    if tied and (variant_of(config) or not (isinstance(kind, bool) or kind == "gaussian")):
        got = f"use_dora={config.use_dora}, init_lora_weights={kind!r}"
        raise ValueError(
            f"{where} with {got}, expected plain LoRA that starts as by True, False or 'gaussian': "
            f"'{next(iter(tied))}' has the adapter of the embedding"
        )


def _tied(
    model: nn.Module, config: LoraConfig, names: list[str], saved: dict[str, nn.Module]
) -> dict[str, str]:
    """`Plan.tied`."""
    tied = tied_to_embedding(model)
    together = {*tied, *tied.values()}
    adapted = sorted(together & set(names))
    if not config.ensure_weight_tying:
        mine = adapted or sorted(together & saved.keys())
        if mine:
            warn(
                f"LoraConfig: {sorted(together)} share one weight, and {mine} will have another "
                "each: `ensure_weight_tying` is not set to True"
            )
        return {}
    if adapted and together & saved.keys():
        raise ValueError(
            f"LoraConfig: ensure_weight_tying: got True with target_modules that mean {adapted} "
            f"and modules_to_save that mean {sorted(together & saved.keys())}, which share one "
            "weight, expected them in one of the two"
        )
    if adapted:
        return {}
    if together & saved.keys():
        return tied
    if not config.trainable_token_indices:  # which warn themselves
        what = (
            "no tied modules are added in either `modules_to_save` or `target_modules`"
            if tied
            else "no tied modules were found in the model"
        )
        warn(f"LoraConfig: You have requested `ensure_weight_tying`, but {what}")
    return {}


def tied_as_held(
    plan: Plan, has_adapter: Callable[[str], bool], has_copy: Callable[[str], bool]
) -> Plan:
    """The plan without the adapters and copies of tied modules that there are none of, if it is the
    tie alone that means them."""
    heads = {name for name in plan.tied_layers if not has_adapter(name)}
    if heads:
        plan = plan._replace(
            names=[name for name in plan.names if name not in heads],
            layers={place: one for place, one in plan.layers.items() if one.name not in heads},
            tied_layers={n: own for n, own in plan.tied_layers.items() if n not in heads},
        )
    named = saved_modules(plan.config)
    absent = {name for name in plan.tied if not has_copy(name) and not matches(name, named)}
    return plan._replace(
        saved={name: module for name, module in plan.saved.items() if name not in absent},
        tied={name: source for name, source in plan.tied.items() if name not in absent},
    )
