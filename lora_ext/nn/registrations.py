"""What is looked after when a module becomes another's child, also by hand."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lora_ext.arguments import warn
from lora_ext.loralib.merging import MergingLayer
from lora_ext.nn.lora_layer import LoraLayer


def _leave_fast_path(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Makes a transformer's layer call its children from now on, once one has an adapter: the fused
    inference path of PyTorch reads their weights without calling them."""
    adapts = isinstance(child, LoraLayer | MergingLayer)
    if adapts and isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _tell_of_lost_adapters(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Warns where a layer with adapters is replaced by one that has neither them nor its weight,
    as transformers does with an lm_head that it resizes."""
    layer = parent._modules.get(name)
    if not isinstance(layer, LoraLayer) or not layer.adapters or child is None:
        return
    if getattr(child, "_is_replica", False):  # of nn.DataParallel, which has them as attributes
        return
    kept = any(module is layer for module in child.modules())
    kept |= any(own is one for own in child.parameters() for one in layer.parameters())
    if not kept:
        warn(
            f"{type(parent).__name__}.{name}: a layer with the adapters {list(layer.adapters)} is "
            f"replaced by a {type(child).__name__} without them; resize or replace layers before "
            "they get adapters"
        )


def watch_registrations() -> None:
    """Makes it so for every layer that becomes a child."""
    register_module_module_registration_hook(_leave_fast_path)
    register_module_module_registration_hook(_tell_of_lost_adapters)
