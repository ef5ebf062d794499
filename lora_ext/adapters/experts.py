"""What a config's target_modules mean for experts that are stacked into parameters, as transformers
5 keeps them: what PEFT 0.21 makes of it, and warnings of what that does not reach."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable

from torch import nn

from lora_ext.adapters.architectures import FUSED, STACKED_EXPERTS
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import ALL_LINEAR
from lora_ext.adapters.modules_to_save import ModulesToSave
from lora_ext.adapters.patterns import compiled
from lora_ext.adapters.targets import (
    all_linear,
    is_adaptable,
    matches,
    model_type,
    outside,
    saved_modules,
)
from lora_ext.nn import LoraLayer

# Names of projections that older versions of transformers had in each expert.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "v1")


def with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config in which the old names of stacked experts have become target_parameters, with
    twice the rank where one parameter holds two projections; the same object if there is nothing to
    change.

    As in PEFT these names then mean nothing else: layers_to_transform, exclude_modules (beside a
    list) and linear layers of the same names are left out, and a regular expression means the last
    parts of the names that it matches. Warnings say so where it makes a difference.

    Raises:
        ValueError: one of two projections that share a parameter is named without the other.
    """
    parameters = STACKED_EXPERTS.get(model_type(model) or "")
    if parameters is None or not _has_stacks(model):
        return config
    if config.target_modules is None:
        return _changed(config, target_modules=[]) if config.target_parameters else config
    given = _last_parts(model, config, parameters)
    named = {target: _meant(target, parameters) for target in given}
    old = {meant for meant in named.values() if meant is not None}
    if not old:
        return config
    _check_fused(config, old, parameters)
    rest = sorted(target for target, meant in named.items() if meant is None)
    wanted = {*(config.target_parameters or ()), *(parameters[name] for name in old)}
    result = _changed(config, target_modules=rest, target_parameters=sorted(wanted))
    if FUSED in wanted and any(parameters[name] == FUSED for name in old):
        pattern = rf".*\.{FUSED}"
        result.rank_pattern = {**(config.rank_pattern or {}), pattern: 2 * config.r}
        result.alpha_pattern = {**(config.alpha_pattern or {}), pattern: 2 * config.lora_alpha}
    _warn_of_differences(model, config, result, old)
    return result


def warn_of_unreached(model: nn.Module, config: LoraConfig, reached: Collection[str]) -> None:
    """Warns where target_modules speaks of projections of stacked experts that get no adapter.

    Args:
        reached: the dotted names of the parameters that get one.
    """
    targets = config.target_modules
    if not targets:
        return
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    missed = []
    for name, module in outside(model, (LoraLayer, ModulesToSave)):
        if is_adaptable(module) or isinstance(module, LoraLayer):
            continue
        stacks = _stacks(name, module)
        old = [f"{name}.{part}" for part in (*_PROJECTIONS, *stacks)]
        if stacks and (everything or any(matches(one, targets) for one in old)):
            missed += [f"{name}.{part}" for part in stacks if f"{name}.{part}" not in reached]
    if missed:
        ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in missed))
        _warn(
            f"target_modules: {targets!r} does not reach experts that are stacked into parameters "
            f"here: {_some(missed)} get no adapter; name them in target_parameters, as in {ends}"
        )


def _has_stacks(model: nn.Module) -> bool:
    return any(
        name.rpartition(".")[2] == FUSED and parameter.dim() == 3
        for name, parameter in model.named_parameters()
    )


def _last_parts(
    model: nn.Module, config: LoraConfig, parameters: Collection[str]
) -> Collection[str]:
    """target_modules as a list; of a string, the last parts of the names that it means."""
    targets = config.target_modules or ()
    if not isinstance(targets, str):
        return targets
    modules = dict(outside(model, (LoraLayer, ModulesToSave)))
    if targets.lower() == ALL_LINEAR:
        linear = all_linear(model, modules, (LoraLayer, ModulesToSave))
        return {name.rpartition(".")[2] for name in linear} | set(parameters)
    weights = [
        f"{name}.{part}" if name else part
        for name, module in (("", model), *modules.items())
        for part in module._parameters
    ]
    containers = {name.rpartition(".")[0] for name in weights if _end(name) in (FUSED, "down_proj")}
    old = [f"{name}.{part}" for name in containers for part in parameters if part != "gate"]
    return {_end(name) for name in (*modules, *weights, *old) if _is_matched(config, targets, name)}


def _is_matched(config: LoraConfig, expression: str, name: str) -> bool:
    return (
        re.fullmatch(expression, name) is not None
        and not matches(name, config.exclude_modules)
        and not any(compiled("modules_to_save", p).match(name) for p in saved_modules(config))
    )


def _meant(target: str, parameters: Iterable[str]) -> str | None:
    """The old name that a target is or ends in."""
    return next((n for n in parameters if target == n or target.endswith(f".{n}")), None)


def _check_fused(config: LoraConfig, old: Collection[str], parameters: dict[str, str]) -> None:
    together = [name for name, parameter in parameters.items() if parameter == FUSED]
    missing = [name for name in together if name not in old]
    if len(missing) == 1:
        raise ValueError(
            f"LoraConfig: target_modules: got {config.target_modules!r} without {missing[0]!r}, "
            f"expected both or none of {together}: this model's experts hold them in one "
            f"parameter, '{FUSED}'"
        )
    for field in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"):
        if getattr(config, field):
            raise ValueError(
                f"LoraConfig: {field}: got {getattr(config, field)!r}, expected none: the names "
                f"{sorted(old)} in target_modules mean stacked experts in this model, and the "
                "update is one of the parameter; leave these names out, or the field"
            )


def _warn_of_differences(
    model: nn.Module, given: LoraConfig, result: LoraConfig, old: Collection[str]
) -> None:
    """What PEFT leaves out, or adds, without a word."""
    what = f"target_modules: {sorted(old)} mean the stacked experts of this model, as in PEFT"
    modules = dict(outside(model, (LoraLayer, ModulesToSave)))
    linear = [
        name
        for name, module in modules.items()
        if _end(name) in old and is_adaptable(module) and not _is_router(name, module)
    ]
    if linear:
        _warn(
            f"{what}; the layers {_some(linear)} get no adapter; name their weights in "
            f"target_parameters, as in {'.'.join(linear[-1].split('.')[-2:]) + '.weight'!r}"
        )
    ignored = ["layers_to_transform"] if given.layers_to_transform not in (None, []) else []
    if given.exclude_modules and not _is_expression(given):
        ignored.append("exclude_modules")
    if ignored:
        _warn(f"{what}, in all layers: {' and '.join(ignored)} do not apply to parameters")
    if _is_expression(given):
        expression = str(given.target_modules)
        more = [
            name
            for name, module in modules.items()
            if matches(name, result.target_modules)
            and is_adaptable(module)
            and not re.fullmatch(expression, name)
        ]
        if more:
            _warn(
                f"target_modules: in a model with stacked experts a regular expression means the "
                f"last parts of the names that it matches, as in PEFT: {_some(more)} are adapted "
                "too; give whole names in target_modules and target_parameters to choose"
            )


def _is_expression(config: LoraConfig) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() != ALL_LINEAR


def _is_router(name: str, module: nn.Module) -> bool:
    """Its weight is the parameter 'gate.weight'."""
    return _end(name) == "gate" and "weight" in module._parameters


def _stacks(name: str, module: nn.Module) -> list[str]:
    """The weights of a module that computes with parameters of its own for experts."""
    kind = type(module).__name__.lower()
    if not any(word in kind for word in ("expert", "router", "gating")):
        if "expert" not in name.rpartition(".")[2].lower():
            return []
    return [
        part
        for part, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() in (2, 3) and "bias" not in part
    ]


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
    warnings.warn(f"LoraConfig: {text}", stacklevel=5)
