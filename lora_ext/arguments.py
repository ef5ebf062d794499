"""What calls take in several forms, in one; and what they cannot take, refused by name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import math
import numbers
import os
import reprlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.utils._contextlib
from torch import Tensor

# Code between a caller and what warns: this package, and what wraps its functions.
_BETWEEN = (
    str(Path(__file__).parent),
    contextlib.__file__,
    torch.utils._contextlib.__file__,
    importlib.__file__,
    "<frozen importlib",
)
# What others call an argument of ours.
_OTHER_NAMES = {
    **{"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha"},
    **{"dropout": "lora_dropout", "dropout_p": "lora_dropout"},
    **{"dora": "use_dora", "rslora": "use_rslora", "modules": "target_modules"},
}
# Larger integers are no floats.
_MAX_FLOAT = int(sys.float_info.max)


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        """Shorter in a list of several."""
        return super().repr_str(
            x if level == self.maxlevel or len(x) <= 60 else x[:57] + "...", level
        )

    def repr_int(self, x: int, level: int) -> str:
        """Python does not write integers of more than 4,300 digits."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring, _SHORT.maxother = 100, 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 8


def short(value: object) -> str:
    """As it is written, for a message: cut where it is long."""
    return _SHORT.repr(value)


def listed(names: Collection[str]) -> str:
    """The first twenty, for a message."""
    first = ", ".join(short(name) for name in itertools.islice(names, 20))
    return f"[{first}]" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def refuse(where: str, argument: str, got: object, expected: str) -> NoReturn:
    """A TypeError in the words of all others."""
    raise TypeError(f"{where}: {argument}: got {describe(got)}, expected {expected}")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line outside of this package that all calls, or imports, come from."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    where = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    # Not by a stacklevel, in which the frames of an import do not count.
    warnings.warn_explicit(text, category, *where, registry)


def describe(value: object) -> str:
    """A value in a message: as it is written where that is short, else what it is."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if value is None or isinstance(value, str | bytes | numbers.Number | list | tuple | dict | set):
        return short(value)
    kind = value if isinstance(value, type) else type(value)
    return f"{'the class' if kind is value else 'a'} {kind.__module__}.{kind.__qualname__}"


def names_of(names: Any, where: str, argument: str = "adapter_names") -> list[str]:
    """A list of names; one string is one name."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, Iterable) and not isinstance(names, Tensor | bytes):
        found = list(names)
        if all(isinstance(name, str) for name in found):
            return found
    refuse(where, argument, names, "a name or a list of names")


def as_number(value: Any, where: str, argument: str, expected: str = "a number") -> float:
    """A Python number of one of Python, numpy or a tensor."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        refuse(where, argument, value, expected)
    if not isinstance(value, numbers.Integral):
        return float(value)
    if abs(int(value)) > _MAX_FLOAT:
        raise ValueError(f"{where}: {argument}: got {describe(value)}, expected {expected}")
    return int(value)


def as_rate(value: Any, where: str, argument: str, above_0: bool = False) -> float:
    """A finite number of at least 0, or above 0."""
    number = as_number(value, where, argument)
    if not 0 <= number < math.inf or (above_0 and number == 0):
        expected = f"a finite number {'above' if above_0 else 'of at least'} 0"
        raise ValueError(f"{where}: {argument}: got {number}, expected {expected}")
    return number


def as_flag(value: Any, where: str, argument: str) -> bool:
    """True or False, also of numpy and as 1 or 0."""
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__.startswith("bool")):
        return bool(value)
    if isinstance(value, numbers.Integral) and value in (0, 1):
        return bool(value)
    refuse(where, argument, value, "True or False")


# What a function's arguments of these names are; all others are tensors.
_NUMBERS = frozenset({"scaling", "scalings", "dropout_p"})
_INTEGERS = frozenset({"rows", "columns", "padding_idx"})
_FLAGS = frozenset({"scale_grad_by_freq"})


def check_kinds(where: str, **arguments: Any) -> None:
    """A TypeError for the first argument of a fused operator that is of another kind than it takes.
    Asked only after a call failed: calls that are right pay nothing for it."""
    for argument, value in arguments.items():
        if argument in _NUMBERS:
            scalable = argument == "scaling" and where == "lora_linear"  # by a tensor, too
            if not (scalable and isinstance(value, Tensor)):
                as_number(value, where, argument)
        elif argument in _INTEGERS:
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                refuse(where, argument, value, "an integer")
        elif argument in _FLAGS:
            as_flag(value, where, argument)
        elif not isinstance(value, Tensor):
            what = " like the input of the call" if where == "draw_rng_state" else ""
            refuse(where, argument, value, f"a torch.Tensor{what}")
        elif value.is_nested:
            raise TypeError(
                f"{where}: {argument}: got a nested tensor, expected a dense one; convert it with "
                "torch.nested.to_padded_tensor"
            )


def named_x(where: str, x: Tensor | None, input: Tensor | None) -> Tensor:
    """The argument of a forward under one of its names: x, as in PEFT, or input, as in torch.nn."""
    given = x if input is None else input
    if given is None or (x is not None and input is not None):
        got = "neither of" if given is None else "both"
        raise TypeError(f"{where}: x: got {got} x and input, expected one of them")
    return given


def as_path(path: Any, where: str, argument: str = "folder") -> Path:
    """TypeError, or ValueError, for what is none."""
    if not isinstance(path, str | os.PathLike):
        refuse(where, argument, path, "a path")
    if "\0" in os.fsdecode(path):
        raise ValueError(
            f"{where}: {argument}: got {describe(str(path))}, expected a path without \\0"
        )
    return Path(path)


def check_known(where: str, argument: str, names: Iterable[Any], known: Collection[str]) -> None:
    """ValueError unless all are names of what there is."""
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"{where}: {argument}: got {describe(name)}, expected one of {list(known)}"
            )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """For a message about a name that there is not; empty without a guess."""
    other = _OTHER_NAMES.get(name)
    near = [other] if other in known else get_close_matches(name, known, 1)
    return f"did you mean {near[0]}? " if near else ""


# Fields that the package fills itself; taken by name, and suggested to nobody.
_INTERNAL = frozenset(
    "unknown_fields absent_fields weights blocks_of_lora_A blocks_of_lora_B "
    "ungrouped_lora_A".split()
)


def check_names(where: str, names: Iterable[str], known: Collection[str]) -> None:
    """TypeError for the name of an argument that there is not."""
    for name in names:
        if name not in known:
            said = [one for one in known if one not in _INTERNAL]
            hint = did_you_mean(name, said).rstrip() or f"expected some of {said}"
            raise TypeError(f"{where}: {name}: unknown, {hint}")


Kind = TypeVar("Kind", bound=type)


def suggests_names(kind: Kind) -> Kind:
    """A class whose constructor refuses unknown arguments with the one that may be meant."""
    construct: Any = kind.__dict__["__init__"]
    known: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" in base.__dict__:
            parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
            known |= {one.name: None for one in parameters if one.kind is not one.VAR_KEYWORD}
            if all(one.kind is not one.VAR_KEYWORD for one in parameters):
                break  # it passes nothing on

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_names(type(self).__name__, kwargs, known)
        construct(self, *args, **kwargs)

    kind.__init__ = checked  # type: ignore[misc]
    return kind


Function = TypeVar("Function", bound=Callable[..., Any])


def former_names(where: str, **names: str) -> Callable[[Function], Function]:
    """A function, called `where` in messages, whose arguments are also taken under the names that
    they had, `former="now"`, with a DeprecationWarning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for former in names.keys() & kwargs.keys():
                now = names[former]
                if now in kwargs:
                    raise TypeError(f"{where}: got {now} and {former}, its former name")
                warn(f"{where}: {former} is {now} now", DeprecationWarning)
                kwargs[now] = kwargs.pop(former)
            return function(*args, **kwargs)

        return cast(Function, renamed)

    return decorate


def check_place(
    where: str,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> None:
    """TypeError or ValueError for where, or of what, no layer can be made; torch has words of its
    own for these, and AssertionErrors."""
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    ):
        refuse(where, "dtype", dtype, "a floating torch.dtype, such as torch.float32")
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{where}: device: got {describe(device)}, expected one that this torch has ({reason})"
        ) from None


def check_mapping(where: str, argument: str, mapping: Any, kind: Any, what: str) -> None:
    """TypeError for what is no mapping of texts to such values."""
    if not isinstance(mapping, Mapping):
        refuse(where, argument, mapping, f"a dict of texts to {what}")
    for key, value in mapping.items():
        if not isinstance(key, str):
            refuse(where, f"{argument}: a key", key, "a text")
        if not isinstance(value, kind):
            refuse(where, f"{argument}[{short(key)}]", value, what)


def check_sizes(where: str, **sizes: Any) -> None:
    """Sizes of a layer: integers of at least 0."""
    for argument, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            refuse(where, argument, size, "an integer")
        if size < 0:
            raise ValueError(f"{where}: {argument}: got {size}, expected at least 0")


def check_module(where: str, argument: str, module: object) -> None:
    """TypeError for what is no module."""
    from torch import nn

    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: {argument}: got {type(module).__qualname__}, expected a Module")
