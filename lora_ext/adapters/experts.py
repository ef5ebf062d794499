"""What a config's target_modules mean for experts that are stacked into parameters, as transformers
5 keeps them: what PEFT 0.21 makes of it, and warnings of what that does not reach."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lora_ext._patterns import compiled
from lora_ext.adapters.architectures import FUSED, READ_NOT_CALLED, STACKED_EXPERTS
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import ALL_LINEAR
from lora_ext.adapters.targets import (
    all_linear,
    matches,
    model_type,
    outside,
    saved_modules,
)
from lora_ext.arguments import warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter import VARIANTS
from lora_ext.nn.kinds import is_of_a_kind
from lora_ext.nn.modules_to_save import ModulesToSave

# Names of projections that older versions of transformers had in each expert.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "v1")

_OldNames = Mapping[str, str]


def with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config in which the old names of stacked experts have become target_parameters, with
    twice the rank where one parameter holds two projections; the same object if there is nothing to
    change.

    As in PEFT these names then mean nothing else: linear layers of the same names are left out, and
    layers_to_transform and exclude_modules have no effect on a parameter that a list names.
    Warnings say so where it makes a difference. A regular expression means what it matches; PEFT
    takes the last parts of that, which may match in other layers.

    Raises:
        ValueError: one of two projections that share a parameter is named without the other, or a
            setting that parameters cannot have.
    """
    parameters = STACKED_EXPERTS.get(model_type(model) or "")
    if parameters is None or not _are_stacked(model):
        return config
    targets = config.target_modules
    if targets is None:
        return _changed(config, target_modules=[]) if config.target_parameters else config
    if _is_expression(targets):
        meant = _matched(model, config, parameters)
    else:
        meant = _listed(model, targets, parameters)
    if not meant.old:
        _warn_of_peft(model, config, parameters)
        return config
    _check_settings(config, meant.old, parameters)
    _warn_of_differences(model, config, meant.old)
    wanted = sorted({*(config.target_parameters or ()), *meant.parameters})
    result = _changed(config, target_modules=meant.modules, target_parameters=wanted)
    if any(parameters[name] == FUSED for name in meant.old):
        pattern = rf".*\.{FUSED}"
        result.rank_pattern = {**(config.rank_pattern or {}), pattern: 2 * config.r}
        result.alpha_pattern = {**(config.alpha_pattern or {}), pattern: 2 * config.lora_alpha}
    return result


def warn_of_unreached(
    model: nn.Module, config: LoraConfig, names: Collection[str], reached: Collection[str]
) -> None:
    """Warns where target_modules speaks of projections of stacked experts that get no adapter, or
    of layers whose adapter does nothing.

    Args:
        names, reached: the dotted names of the modules and of the parameters that get one.
    """
    uncalled = READ_NOT_CALLED.get(model_type(model) or "", ())
    idle = [name for name in names if matches(name, uncalled)]
    if idle:
        _warn(
            f"target_modules: the model reads the weight of {_some(idle)} without calling it: an "
            "adapter there has an effect only once it is merged; exclude it with exclude_modules"
        )
    targets = config.target_modules
    if not targets:
        return
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    missed = []
    for name, module in outside(model, (LoraLayer, ModulesToSave)):
        stacks = _stacks(name, module)
        if stacks and not everything:
            old = [f"{name}.{part}" for part in (*_PROJECTIONS, *stacks)]
            spoken_of = any(matches(one, targets) for one in old)
            stacks = [] if _is_router(name, module) or not spoken_of else stacks
        missed += [f"{name}.{part}" for part in stacks if f"{name}.{part}" not in reached]
    if missed:
        ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in missed))
        _warn(
            f"target_modules: {targets!r} does not reach experts that are stacked into parameters "
            f"here: {_some(missed)} get no adapter; name them in target_parameters, as in {ends}"
        )


class _Meant(NamedTuple):
    """What target_modules mean where experts are stacked."""

    modules: list[str]
    parameters: list[str]
    old: set[str]  # the old names among them


def _are_stacked(model: nn.Module) -> bool:
    """Whether the experts are parameters: in any model of such a type for PEFT, from transformers 5
    on."""
    library = sys.modules.get("transformers")
    if library is not None and int(library.__version__.partition(".")[0]) >= 5:
        return True
    return any(_end(name) == FUSED for name, _ in model.named_parameters())


def _listed(model: nn.Module, targets: str | Collection[str], parameters: _OldNames) -> _Meant:
    if isinstance(targets, str):  # all-linear
        kinds = (LoraLayer, ModulesToSave)
        linear = all_linear(model, dict(outside(model, kinds)), kinds)
        targets = {_end(name) for name in linear} | set(parameters)
    old = {name: _old_name(name, parameters) for name in targets}
    found = {name for name in old.values() if name is not None}
    return _Meant(
        sorted(name for name, meaning in old.items() if meaning is None),
        sorted({parameters[name] for name in found}),
        found,
    )


def _matched(model: nn.Module, config: LoraConfig, parameters: _OldNames) -> _Meant:
    """What a regular expression matches, by last parts of names where these mean no more."""
    stacks = [
        f"{name}.{part}"
        for name, module in outside(model, (ModulesToSave,))
        for part in module._parameters
        if part in parameters.values() or (part == "weight" and _end(name) == "gate")
    ]
    found: dict[str, set[str]] = {}
    for stack in stacks:
        container, _, part = stack.rpartition(".")
        # The weight of a router has the name of its module; a projection stood beside the others.
        names = (
            [container]
            if part == "weight"
            else [
                f"{container}.{old}" for old, parameter in parameters.items() if parameter == part
            ]
        )
        found[stack] = {_end(name) for name in names if _is_matched(config, name)}
    chosen = [stack for stack, old in found.items() if old]
    for stack in chosen:
        _check_fused(config, found[stack], parameters)
    modules = [name for name, _ in outside(model, (LoraLayer, ModulesToSave))]
    rest = [name for name in modules if _is_matched(config, name) and _end(name) not in parameters]
    return _Meant(
        _short(rest, modules, {_end(name) for name in rest}),
        _short(chosen, stacks, {parameters[name] for old in found.values() for name in old}),
        {name for old in found.values() for name in old},
    )


def _short(names: Sequence[str], all_names: Sequence[str], ends: Collection[str]) -> list[str]:
    """The names by their ends, or whole if these mean others too."""
    alike = [name for name in all_names if matches(name, ends)]
    return sorted(ends) if len(alike) == len(names) else list(names)


def _old_name(target: str, parameters: _OldNames) -> str | None:
    """The old name that a target is or ends in."""
    return next((n for n in parameters if target == n or target.endswith(f".{n}")), None)


def _check_settings(config: LoraConfig, old: Collection[str], parameters: _OldNames) -> None:
    _check_fused(config, old, parameters)
    for field in ("lora_dropout", "fan_in_fan_out", "lora_bias", *VARIANTS):
        if getattr(config, field):
            raise ValueError(
                f"LoraConfig: {field}: got {getattr(config, field)!r}, expected none: the names "
                f"{sorted(old)} in target_modules mean stacked experts in this model, and the "
                "update is one of the parameter; leave these names out, or the field"
            )


def _check_fused(config: LoraConfig, old: Collection[str], parameters: _OldNames) -> None:
    together = [name for name, parameter in parameters.items() if parameter == FUSED]
    missing = [name for name in together if name not in old]
    if len(missing) == 1:
        raise ValueError(
            f"LoraConfig: target_modules: got {config.target_modules!r} without {missing[0]!r}, "
            f"expected both or none of {together}: this model's experts hold them in one "
            f"parameter, '{FUSED}'"
        )


def _warn_of_differences(model: nn.Module, config: LoraConfig, old: Collection[str]) -> None:
    """Of what PEFT leaves out, or adds, without a word."""
    what = f"target_modules: {sorted(old)} mean the stacked experts of this model, as in PEFT"
    linear = [
        name
        for name, module in outside(model, (LoraLayer, ModulesToSave))
        if _end(name) in old and _end(name) != "gate" and is_of_a_kind(module)
    ]
    if linear:
        weight = ".".join(linear[-1].split(".")[-2:]) + ".weight"
        _warn(
            f"{what}; the layers {_some(linear)} get no adapter; name their weights in "
            f"target_parameters, as in {weight!r}"
        )
    if _is_expression(config.target_modules):
        return
    ignored = ["layers_to_transform"] if config.layers_to_transform not in (None, []) else []
    ignored += ["exclude_modules"] if config.exclude_modules else []
    if ignored:
        _warn(f"{what}, in all layers: {' and '.join(ignored)} do not apply to parameters")


def _warn_of_peft(model: nn.Module, config: LoraConfig, parameters: _OldNames) -> None:
    """Of an expression for linear layers alone, which PEFT takes for the stacks."""
    if not _is_expression(config.target_modules):
        return
    linear = [
        name
        for name, module in outside(model, (LoraLayer, ModulesToSave))
        if _end(name) in parameters and is_of_a_kind(module) and _is_matched(config, name)
    ]
    if linear:
        _warn(
            f"target_modules: {_some(linear)} get adapters, but PEFT 0.21 takes their names for "
            "stacked experts in this model: it will not load them"
        )


def _is_matched(config: LoraConfig, name: str) -> bool:
    """Whether the regular expression means the name, as PEFT decides it here."""
    return (
        matches(name, str(config.target_modules))
        and not matches(name, config.exclude_modules)
        and not any(compiled("modules_to_save", p).match(name) for p in saved_modules(config))
    )


def _is_expression(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() != ALL_LINEAR


def _stacks(name: str, module: nn.Module) -> list[str]:
    """The weights of a module that computes with parameters of its own for experts."""
    own = f"{type(module).__name__} {_end(name)}".lower()
    if is_of_a_kind(module) or isinstance(module, LoraLayer):
        return []
    if "expert" not in own and not _is_router(name, module):
        return []
    return [
        part
        for part, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() in (2, 3) and "bias" not in part
    ]


def _is_router(name: str, module: nn.Module) -> bool:
    own = f"{type(module).__name__} {_end(name)}".lower()
    return any(word in own for word in ("router", "gating"))


def _changed(config: LoraConfig, **fields: object) -> LoraConfig:
    result = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if names[2:] else ""
    return ", ".join(map(repr, names[:2])) + more


def _warn(text: str) -> None:
    warn(f"LoraConfig: {text}")
