"""Whether this process is the program `lora-ext`: its help and `doctor` do without torch, which
takes seconds to import, and without the compiled extension, which may be what is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

# One argument of Python that ends in -m, alone or with flags before it: -m, -Im, -mlora_ext
_MODULE = re.compile(r"-[bBdEiIOPqsSuvx]*m(.*)")
_asked = False


def is_program() -> bool:
    """Whether the package is imported as `python -m lora_ext` or by the script `lora-ext`, and
    nothing has asked for its names yet."""
    arguments = getattr(sys, "argv", None) or [""]  # an embedded Python may have none
    if _asked:
        return False
    if arguments[0] == "-m":  # so it is while Python looks for the module
        return _module(sys.orig_argv) == "lora_ext"
    return Path(arguments[0]).name == "lora-ext"


def _module(arguments: Sequence[str]) -> str:
    for argument, following in zip(arguments[1:], [*arguments[2:], ""], strict=True):
        if found := _MODULE.fullmatch(argument):
            return found[1] or following
    return ""


def load_when_asked(package: str, names: Collection[str]) -> None:
    """Has the package's `__init__` run again, as everywhere else, when one of its names is used."""
    module = sys.modules[package]

    def find(name: str) -> Any:
        global _asked
        if name not in names or module.__spec__ is None or module.__spec__.loader is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _asked = True
        del vars(module)["__getattr__"]
        module.__spec__.loader.exec_module(module)
        return getattr(module, name)

    vars(module)["__getattr__"] = find
