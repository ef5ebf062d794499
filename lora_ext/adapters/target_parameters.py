"""Which parameters LoraConfig.target_parameters means, and the layers that adapt them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from lora_ext._patterns import compiled
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules, plain_name
from lora_ext.adapters.targets import matches, near_misses, saved_modules
from lora_ext.arguments import short, warn
from lora_ext.nn import AnyLayer, LoraLayer, ParamLayer
from lora_ext.nn.modules_to_save import ModulesToSave


class TargetedModule(NamedTuple):
    """A module, its parameters that get adapters, and the layer that stands in its place."""

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    layer: ParamLayer


def find_parameters(
    model: nn.Module, config: LoraConfig, targets: Collection[str]
) -> list[TargetedModule]:
    """The parameters that PEFT adapts: those whose dotted name is in `config.target_parameters`, or
    ends in one of it after a dot. Nothing is changed.

    Args:
        targets: the names of the modules that target_modules means.

    Raises:
        ValueError: nothing matched, and there are no `targets`; a match is the model's own
            parameter, or that of a module which target_modules means too, or has an adapter
            already; another adapter has other parameters of the same module; a parameter cannot be
            adapted.
        TypeError: a parameter is quantized.
    """
    where = "LoraConfig: target_parameters"
    wanted = frozenset(config.target_parameters or ())
    saved = [compiled("modules_to_save", pattern) for pattern in saved_modules(config)]
    found: list[TargetedModule] = []
    inside = None
    for name, module in named_modules(model):
        if inside is not None and name.startswith(inside):
            continue
        hides = isinstance(module, LoraLayer | ModulesToSave) and not isinstance(module, AnyLayer)
        if any(pattern.match(name) for pattern in saved):  # whole
            continue
        inside = f"{name}." if hides else None
        names = tuple(part for part in _base_parameters(module) if _is_wanted(name, part, wanted))
        if not names:
            continue
        if not name:
            raise ValueError(
                f"{where}: {names[0]!r} is a parameter of the model itself, which "
                "cannot be swapped in place; put the model into another module"
            )
        other = isinstance(module, LoraLayer) and not isinstance(module, ParamLayer)
        if other or name in targets:
            raise ValueError(
                f"{where}: {names[0]!r} is a parameter of {name!r}, which target_modules adapts; "
                "name it in one of the two (target_modules=[] means no module)"
            )
        if isinstance(module, ParamLayer):
            if names != module.WEIGHTS:
                raise ValueError(
                    f"{where}: got {list(names)} of {name!r}, expected {list(module.WEIGHTS)}, "
                    "which the adapters that are there have"
                )
            layer = module
        else:
            layer = ParamLayer.from_module(module, names, r=0)
        found.append(TargetedModule(name, module, names, layer))
    if wanted and not found:
        names_there = [plain_name(name) for name, p in model.named_parameters() if p.dim() >= 2]
        hidden = next((name for name in names_there if matches(name, wanted)), None)
        hint = near_misses(wanted, names_there)
        if hidden is not None:
            hint = (
                f"{hidden!r} is in a module that is saved whole (modules_to_save) or has other "
                "adapters; leave it out of one of the two"
            )
        text = (
            f"{where}: {short(config.target_parameters)} matches no parameter that can have an "
            f"adapter; {hint}"
        )
        if not targets:
            raise ValueError(text)
        warn(text)
    return found


def _base_parameters(module: nn.Module) -> list[str]:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if not isinstance(module, LoraLayer):
        return names
    own = {name for adapter in module.adapters for name in module.adapter_parameters(adapter)}
    return [name for name in names if name not in own]


def _is_wanted(module_name: str, parameter: str, wanted: Collection[str]) -> bool:
    key = f"{module_name}.{parameter}" if module_name else parameter
    return matches(key, wanted)
