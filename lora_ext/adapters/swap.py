"""Putting modules in the place of others, in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

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
    _leave_nested_tensors(model)
    return swapped


def _leave_nested_tensors(model: nn.Module) -> None:
    """Makes PyTorch's encoders hand plain tensors to layers with adapters, which take no others."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(isinstance(child, LoraLayer) for child in module.modules()):
                module.use_nested_tensor = False
