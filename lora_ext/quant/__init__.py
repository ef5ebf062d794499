"""Quantized matrices of several libraries in one form, read and written without those libraries.

What is here is imported when it is asked for: most models have nothing quantized."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.quant.convert import dequantize_, quantize_
    from lora_ext.quant.encode import quantize
    from lora_ext.quant.gguf import read_gguf
    from lora_ext.quant.kinds import register_dequantizer
    from lora_ext.quant.linear import Linear
    from lora_ext.quant.read import read_state_dict, read_weight
    from lora_ext.quant.weight import NestedScales, QuantizedWeight

__all__ = [
    "Linear",
    "NestedScales",
    "QuantizedWeight",
    "dequantize_",
    "quantize",
    "quantize_",
    "read_gguf",
    "read_state_dict",
    "read_weight",
    "register_dequantizer",
]

# No module has the name of what is in one: importing it would put it in that one's place.
_PLACES = {
    "convert": ["dequantize_", "quantize_"],
    "encode": ["quantize"],
    "gguf": ["read_gguf"],
    "kinds": ["register_dequantizer"],
    "linear": ["Linear"],
    "read": ["read_state_dict", "read_weight"],
    "weight": ["NestedScales", "QuantizedWeight"],
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            found = getattr(import_module(f"{__name__}.{place}"), name)
            return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
