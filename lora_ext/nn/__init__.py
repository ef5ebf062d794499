"""Drop-in modules. Names and arguments are like loralib's; what stands for loralib itself is
`lora_ext.loralib`."""

from lora_ext.nn.adapter import AdapterSettings
from lora_ext.nn.any_layer import AnyLayer
from lora_ext.nn.attention import MultiheadAttention
from lora_ext.nn.conv import Conv1d, Conv2d, Conv3d
from lora_ext.nn.embedding import Embedding
from lora_ext.nn.linear import Linear
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.merged_linear import MergedLinear
from lora_ext.nn.param_layer import ParamLayer
from lora_ext.nn.registrations import watch_registrations as _watch_registrations
from lora_ext.nn.trainable import (
    lora_state_dict,
    mark_only_lora_as_trainable,
    print_trainable_parameters,
)
from lora_ext.nn.variants import give_variants as _give_variants

__all__ = [
    "AdapterSettings",
    "AnyLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "MergedLinear",
    "MultiheadAttention",
    "ParamLayer",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "print_trainable_parameters",
]

_give_variants()
_watch_registrations()
