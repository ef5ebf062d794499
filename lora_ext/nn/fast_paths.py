"""PyTorch's fused inference paths, which read a layer's weight without calling the layer."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lora_ext.loralib.merging import MergingLayer
from lora_ext.nn.lora_layer import LoraLayer


def _leave_fast_path(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Makes a transformer's layer call its children from now on, once one has an adapter."""
    adapts = isinstance(child, LoraLayer | MergingLayer)
    if adapts and isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def watch_registrations() -> None:
    """Makes it so for every layer that becomes a child, also by hand."""
    register_module_module_registration_hook(_leave_fast_path)
