"""The modules of a model by the names that they have without torch.compile's wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lora_ext.adapters.config_checks import MAX_PATTERN_CHARACTERS
from lora_ext.adapters.patterns import size

# Where torch.compile(module) keeps the module.
_WRAPPED = "_orig_mod"
# Where a module to save, of which adapters have copies, keeps what it stands for.
ORIGINAL = ".original_module"


def plain_name(name: str) -> str:
    """A dotted name without the levels of torch.compile."""
    if _WRAPPED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, or what torch.compile made it of."""
    while isinstance(inner := module._modules.get(_WRAPPED), nn.Module):
        module = inner
    return module


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what torch.compile returns for a module."""
    return _WRAPPED in module._modules


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as if torch.compile had wrapped none of them."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if not is_wrapper(module):
            yield plain_name(name), module


def ends(name: str) -> Iterator[str]:
    """The name and all that follows a dot in it."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def exact_targets(
    model: nn.Module, names: Sequence[str], *, shortest: bool = False
) -> list[str] | str:
    """target_modules that mean exactly these modules of `model`: a list, of their names or of the
    shortest ends of these; where a name is also the end of another's, a regular expression (unless
    that would be longer than a config's may be)."""
    meant = set(names)
    others = (name.replace(ORIGINAL, "") for name, _ in named_modules(model))
    taken = {end for name in others if name not in meant for end in ends(name)}
    targets: dict[str, None] = {}
    for name in names:
        free = [end for end in ends(name) if end not in taken]
        if not free:
            expression = "|".join(re.escape(name) for name in names)
            return expression if size(expression) <= MAX_PATTERN_CHARACTERS else list(names)
        targets[free[-1] if shortest else name] = None
    return list(targets)
