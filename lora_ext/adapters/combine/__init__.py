"""A new adapter of several: `request` checks what is asked for, `tensors` makes the factors of one
layer, by the ways of `mixing` or by SVD, and `model` does it in every layer."""

from lora_ext.adapters.combine.model import add_weighted_adapter

__all__ = ["add_weighted_adapter"]
