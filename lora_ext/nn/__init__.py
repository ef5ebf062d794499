"""Drop-in modules."""

from lora_ext.nn.conv import Conv1d, Conv2d, Conv3d
from lora_ext.nn.embedding import Embedding
from lora_ext.nn.linear import Linear
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.settings import AdapterSettings

__all__ = ["AdapterSettings", "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer"]
