"""Layers that run as one: q, k and v of one x, and an MLP with a gate.

What is here is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.blocks.operators import lora_mlp, lora_qkv

__all__ = ["lora_mlp", "lora_qkv"]

_MODULES = {"lora_mlp": "operators", "lora_qkv": "operators"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
