"""Working on whole models: putting adapters in, training, saving and inspecting them."""

from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.explain import explain
from lora_ext.adapters.lora_model import LoraModel, get_lora_model, get_peft_model
from lora_ext.adapters.replace_linear import replace_linear
from lora_ext.nn.trainable import (
    lora_state_dict,
    mark_only_lora_as_trainable,
    print_trainable_parameters,
)

__all__ = [
    "LoraConfig",
    "LoraModel",
    "explain",
    "get_lora_model",
    "get_peft_model",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "print_trainable_parameters",
    "replace_linear",
]
