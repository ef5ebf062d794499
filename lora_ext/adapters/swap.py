"""Putting modules in the place of others, in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_ext.adapters.names import is_wrapper, plain_name
from lora_ext.nn import LoraLayer


def swap_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[str]:
    """Puts `replacements[id(old)]` where `old` is, under every name that it has in `model`.

    Returns:
        The names that were swapped, in the order of `model.named_modules()`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    swapped = [name for name, module in modules.items() if id(module) in replacements]
    for name in swapped:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, replacements[id(modules[name])])
        other = replacements.get(id(modules[parent]))  # which may have the child, too
        if other is not None and other._modules.get(child) is modules[name]:
            setattr(other, child, replacements[id(modules[name])])
        if is_wrapper(modules[parent]):  # it calls what it was made of, until it is made anew
            modules[parent].__setstate__(modules[parent].__getstate__())
    _leave_fast_paths(model)
    return [plain_name(name) for name in swapped]


def _leave_fast_paths(model: nn.Module) -> None:
    """Makes PyTorch's fused inference paths step aside where they would read a swapped layer's
    weight without calling the layer, and so leave out its adapter."""
    for module in model.modules():
        adapted = any(isinstance(child, LoraLayer) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and adapted:
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and adapted:
            module.use_nested_tensor = False
