"""The modules of a model by the names that they have without torch's wrappers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import nn

from lora_ext._patterns import MAX_PATTERN_CHARACTERS, size

# Where torch.compile(module) keeps the module.
COMPILED = "_orig_mod"
# And where torch's checkpoint_wrapper() and offload_wrapper() do.
_WRAPPED = (COMPILED, "_checkpoint_wrapped_module")
# Where a module to save, of which adapters have copies, keeps what it stands for.
ORIGINAL = ".original_module"


def plain_name(name: str) -> str:
    """A dotted name without the levels of wrappers."""
    if not has_wrapper_level(name):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def has_wrapper_level(name: str) -> bool:
    """Whether a name may have levels of wrappers."""
    return any(level in name for level in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, or the one in its wrappers."""
    while level := _level(module):
        module = module.get_submodule(level)
    return module


def is_wrapper(module: nn.Module) -> bool:
    """Whether it stands for the module in it."""
    return _level(module) is not None


def _level(module: nn.Module) -> str | None:
    return next((level for level in _WRAPPED if level in module._modules), None)


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as if none of them were wrapped."""
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


def ends_in(names: Collection[str]) -> Callable[[str], bool]:
    """What `str.endswith` says of these, of which there may be very many."""
    known, lengths = frozenset(names), {len(name) for name in names}
    return lambda name: any(name[len(name) - n :] in known for n in lengths if n <= len(name))


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
