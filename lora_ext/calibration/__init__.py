"""Adapters that start from data: one calibration pass, of which EVA, CorDA and LoRA-GA are made.

What is here is imported when it is asked for: most adapters start without."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.calibration.corda import preprocess_corda
    from lora_ext.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
    from lora_ext.calibration.lora_ga import preprocess_loraga

__all__ = [
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
]

_PLACES = {
    "get_eva_state_dict": "eva",
    "initialize_lora_eva_weights": "eva",
    "preprocess_corda": "corda",
    "preprocess_loraga": "lora_ga",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
