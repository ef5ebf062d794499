"""Quantized matrices of several libraries in one form, read and written without those libraries.

No layer takes one yet: they are refused as before.
"""

from lora_ext.quant.gguf import read_gguf
from lora_ext.quant.quantize import quantize
from lora_ext.quant.read import read_state_dict, read_weight
from lora_ext.quant.weight import NestedScales, QuantizedWeight

__all__ = [
    "NestedScales",
    "QuantizedWeight",
    "quantize",
    "read_gguf",
    "read_state_dict",
    "read_weight",
]
