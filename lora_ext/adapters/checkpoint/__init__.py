"""The adapters of a model in files of PEFT's format."""

from lora_ext.adapters.checkpoint.load import load_adapter
from lora_ext.adapters.checkpoint.save import adapter_state_dict, save_pretrained

__all__ = ["adapter_state_dict", "load_adapter", "save_pretrained"]
