"""Quantized matrices of several libraries in one form, read and written without those libraries."""

from lora_ext.quant.convert import dequantize_, quantize_
from lora_ext.quant.gguf import read_gguf
from lora_ext.quant.linear import Linear
from lora_ext.quant.modules import register_dequantizer
from lora_ext.quant.quantize import quantize
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
