"""Drop-in modules."""

from lora_ext.nn.linear import Linear

__all__ = ["Linear"]
