"""Adapters of any kind as plain LoRA: singular vectors of what each adds to its weights.

What is here is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.conversion.to_lora import convert_to_lora, save_as_lora

__all__ = ["convert_to_lora", "save_as_lora"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        found = getattr(import_module(f"{__name__}.to_lora"), name)
        return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
