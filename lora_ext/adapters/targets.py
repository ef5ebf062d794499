"""Which modules of a model a LoraConfig means. Nothing is changed here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NoReturn

from torch import nn

from lora_ext._patterns import compiled, matching
from lora_ext.adapters.architectures import (
    DEFAULT_TARGETS,
    MAMBA,
    NOT_CALLED_IN_MAMBA,
    TASK_HEADS,
)
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import ALL_LINEAR
from lora_ext.adapters.names import ORIGINAL, ends, named_modules, unwrapped
from lora_ext.arguments import listed, short, warn
from lora_ext.nn.any_layer import AnyLayer
from lora_ext.nn.kinds import can_be_adapted
from lora_ext.nn.linear import transformers_conv1d
from lora_ext.quant.kinds import quantized_kind

# The number of the layer: the first one in the name that does not end it.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def matches(
    name: str, modules: str | Collection[str] | None, field: str = "target_modules"
) -> bool:
    """Whether a module's dotted name is meant, as in PEFT: a string is a regular expression for the
    whole name, a collection holds names or their last parts. `field` is for messages."""
    if modules is None:
        return False
    if isinstance(modules, str):
        return compiled(field, modules).fullmatch(name) is not None
    return any(end in modules for end in ends(name))


def saved_modules(config: LoraConfig) -> list[str]:
    """`modules_to_save` with the heads that the task adds to it."""
    given = list(config.modules_to_save or ())
    heads = TASK_HEADS.get(config.task_type or "", ())
    return given + [head for head in heads if head not in given]


def has_targets(model: nn.Module, config: LoraConfig) -> bool:
    """Whether target_modules names modules, itself or by the architecture's default."""
    if config.target_modules is None:
        return (model_type(model) or "") in DEFAULT_TARGETS
    return bool(config.target_modules)


def find_targets(
    model: nn.Module,
    config: LoraConfig,
    adaptable: Callable[[nn.Module], bool] = can_be_adapted,
    adapted: tuple[type[nn.Module], ...] = (),
    required: bool = True,
) -> list[str]:
    """The names of the modules that get an adapter: those that PEFT's LoRA would swap.

    A module under several names has the first one, as in `named_modules()`. The output projection
    of an nn.MultiheadAttention is never a target of its own: it is part of that module, which reads
    its weight without calling it.

    Args:
        model: searched through; not changed.
        config: all fields on targeting.
        adaptable: whether a module can get an adapter.
        adapted: types of layers that have adapters already. They can be targets again if
            `adaptable` says so; what is inside them cannot.
        required: whether there has to be one.

    Returns:
        Names in the order of `model.named_modules()`; at least one, if required.

    Raises:
        ValueError: nothing matched (with near misses), everything that matched is excluded, a match
            cannot be adapted, or target_modules is None and the architecture has no default.

    Warns of exclude_modules that match nothing.
    """
    modules = dict(outside(model, adapted))
    is_target = _selection(model, modules, config, adapted)
    matched = [name for name in modules if is_target(name)]
    if not matched and required:
        _raise_no_match(model, modules, config, adaptable)
    if not matched:
        _warn(f"target_modules: {config.target_modules!r} matches no module")
        return []

    excluded = _collection(config.exclude_modules)
    saved = saved_modules(config)
    kept = [
        name
        for name in matched
        if not matches(name, excluded, "exclude_modules")
        and not any(True for _ in matching("modules_to_save", saved, name))
    ]
    if not kept and not required:
        return []
    if not kept:
        raise ValueError(
            f"LoraConfig: target_modules: all of its {len(matched)} matches ({matched[0]!r}, ...) "
            f"are excluded by exclude_modules={short(config.exclude_modules)} or saved whole by "
            f"modules_to_save={short(saved_modules(config))}"
        )
    targets = _check_kinds(model, modules, kept, config, adaptable)
    if excluded and not any(matches(name, excluded, "exclude_modules") for name in modules):
        _warn(f"exclude_modules: {short(config.exclude_modules)} matches no module")
    return targets


def warn_of_unused_patterns(config: LoraConfig, names: Collection[str]) -> None:
    """Warns of keys of rank_pattern and alpha_pattern that match none of the names adapted."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field) or {}
        used = {one for name in names for one in matching(field, patterns, name)}
        unused = [pattern for pattern in patterns if pattern not in used]
        if unused:
            _warn(f"{field}: {listed(unused)} match no module that is adapted")


def warn_of_unused_names(
    where: str, targets: str | Iterable[str] | None, modules: Iterable[str]
) -> None:
    """Warns of names in a list of target_modules that are no module's: mistyped, or of another
    kind of model. `modules` are the dotted names of all there are."""
    if targets is None or isinstance(targets, str):
        return
    known = {end for name in modules for end in ends(name.replace(ORIGINAL, ""))}
    unused = [name for name in targets if name not in known]
    if unused:
        warn(f"{where}: target_modules: {listed(unused)} match no module; the others do")


def outside(
    model: nn.Module, adapted: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Everything below the model but the insides of layers with adapters."""
    inside = None
    for name, module in named_modules(model):
        if not name or (inside is not None and name.startswith(inside)):
            continue
        hides = isinstance(module, adapted) and not isinstance(module, AnyLayer)
        inside = f"{name}." if hides else None
        yield name, module


def _selection(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    adapted: tuple[type[nn.Module], ...],
) -> Callable[[str], bool]:
    """Whether target_modules, layers_to_transform and layers_pattern mean a name."""
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model, config)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = all_linear(model, modules, adapted)
        return linear.__contains__
    if isinstance(targets, str):
        expression = compiled("target_modules", targets)
        return lambda name: expression.fullmatch(name) is not None
    names = frozenset(targets)
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return lambda name: matches(name, names)
    numbers = {layers} if isinstance(layers, int) else set(layers)
    # A whole name says its layer itself.
    return lambda name: (
        name in names or (matches(name, names) and _layer(name, config.layers_pattern) in numbers)
    )


def _default_targets(model: nn.Module, config: LoraConfig) -> str | list[str]:
    architecture = model_type(model)
    targets = DEFAULT_TARGETS.get(architecture or "")
    if targets is None:
        raise ValueError(
            "LoraConfig: target_modules: got None, and there is no default for a model of "
            f"model_type {architecture!r}; Please specify `target_modules`: name modules"
        )
    if isinstance(targets, str):
        if config.layers_to_transform is not None:
            raise ValueError(
                f"LoraConfig: layers_to_transform: the default target_modules of {architecture!r} "
                "are a regular expression; give a list of names there"
            )
        return targets
    return list(targets)


def model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config.get("model_type")
    return getattr(config, "model_type", None)


def all_linear(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adapted: tuple[type[nn.Module], ...],
) -> set[str]:
    """Every linear layer but the output head and what an attention module does not call."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = unwrapped(head) if isinstance(head, nn.Module) else head
    return {
        name
        for name, module in modules.items()
        if module is not head
        and (
            isinstance(module, nn.Linear)
            or transformers_conv1d(module) is not None
            or quantized_kind(module) is not None
            or (
                isinstance(module, adapted)
                and "Linear" in type(module).__name__
                and not isinstance(module, AnyLayer)  # what target_parameters means
            )
        )
        and _attention_around(name, modules) is None
    }


def _layer(name: str, patterns: str | list[str] | None) -> int | None:
    """The number of the layer that the name is in."""
    if not patterns:
        found = _LAYER.match(name)
        return int(found["index"]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = compiled("layers_pattern", pattern).match(name)
        if found:  # an alternative outside of brackets matches without a number, as in PEFT
            return None if found["index"] is None else int(found["index"])
    return None


def _check_kinds(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    names: list[str],
    config: LoraConfig,
    adaptable: Callable[[nn.Module], bool],
) -> list[str]:
    """Those of the names that get a layer of their own, if all of them can be adapted."""
    targets = []
    is_mamba = model_type(model) in MAMBA
    for name in names:
        attention = _attention_around(name, modules)
        if attention is not None:
            if attention not in names:
                raise ValueError(
                    f"LoraConfig: target_modules: {name!r} is part of a MultiheadAttention, which "
                    f"does not call it; name {attention!r} itself"
                )
            continue
        if is_mamba and name.rpartition(".")[2] in NOT_CALLED_IN_MAMBA:
            raise ValueError(
                f"LoraConfig: target_modules: {name!r} is not called by a Mamba model's fused "
                "kernels, so an adapter would do nothing; exclude it with exclude_modules"
            )
        module = modules[name]
        if not adaptable(module):
            kind = type(module)
            stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
            own = [f"{name.rpartition('.')[2]}.{one}" for one in stacked]
            cure = f"; its stacked weights are adapted by target_parameters={own}" if own else ""
            raise ValueError(
                f"LoraConfig: target_modules: {name!r} is a {kind.__module__}.{kind.__qualname__}, "
                "which cannot be adapted; name other modules, or exclude this one with "
                f"exclude_modules{cure}"
            )
        targets.append(name)
    return targets


def _attention_around(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    parent = name.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else None


def _raise_no_match(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    adaptable: Callable[[nn.Module], bool],
) -> NoReturn:
    wanted = config.target_modules
    if wanted is None:
        wanted = _default_targets(model, config)
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    hint = near_misses(names, [name for name, module in modules.items() if adaptable(module)])
    if isinstance(wanted, str) and any(matches(name, names) for name in modules):
        hint = f"a string is a regular expression for whole names; did you mean [{short(wanted)}]?"
    elif config.layers_to_transform is not None and any(matches(name, names) for name in modules):
        hint = (
            f"layers_to_transform={short(config.layers_to_transform)} with layers_pattern="
            f"{short(config.layers_pattern)} leaves none of the modules of these names"
        )
    elif parameters := [
        name
        for name, _ in model.named_parameters()
        if matches(name, wanted if isinstance(wanted, str) else names)
    ]:
        hint = f"{parameters[0]!r} is a parameter; name it in target_parameters"
    else:
        first_names = {module: name for name, module in modules.items()}
        for name, module in named_modules(model, remove_duplicate=False):
            if (
                matches(name, wanted if isinstance(wanted, str) else names)
                and module in first_names
            ):
                hint = f"{name!r} is the same module as {first_names[module]!r}; name that"
                break
    raise ValueError(
        f"LoraConfig: target_modules: {short(config.target_modules)} matches no module; {hint}"
    )


def near_misses(wanted: Iterable[str], names: Iterable[str]) -> str:
    """What to tell who asked for `wanted` where only `names` exist."""
    last = sorted({name.rpartition(".")[2] for name in names})
    last_parts = [want.rpartition(".")[2][:100] for want in sorted(wanted)[:20]]
    near = sorted({hit for part in last_parts for hit in difflib.get_close_matches(part, last)})
    if near:
        return f"did you mean {near}?"
    if difflib.get_close_matches(ALL_LINEAR, last_parts):
        return f'did you mean the string "{ALL_LINEAR}"?'
    if not any(last):  # at most the model itself, which has no name
        return "nothing in the model can be adapted; put a single layer into an nn.Sequential first"
    return f"the modules that can be adapted end in {last[:20]}"


def _collection(names: str | Collection[str] | None) -> str | Collection[str] | None:
    return names if names is None or isinstance(names, str) else frozenset(names)


def _warn(text: str) -> None:
    warn(f"LoraConfig: {text}")
