"""Drop-in modules."""

from lora_ext.nn.linear import Linear
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.settings import AdapterSettings

__all__ = ["AdapterSettings", "Linear", "LoraLayer"]
