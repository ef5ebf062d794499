"""Repeating the layers of a transformer, sharing their weights (LoraConfig.layer_replication)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_ext.arguments import warn
from lora_ext.nn.adoption import without_bound_calls
from lora_ext.nn.transaction import Transaction


def replicate_layers(
    model: nn.Module, layer_map: Sequence[Sequence[int]], transaction: Transaction
) -> None:
    """Replaces the list of layers by ranges of itself: [[0, 4], [2, 5]] of five layers makes the
    layers 0, 1, 2, 3, 2, 3, 4. Copies share the parameters and buffers of their original.

    Raises:
        ValueError: there is no such list, or a range is outside of it.
    """
    parent, name = _layer_list(model)
    layers = getattr(parent, name)
    for start, end in layer_map:
        if not 0 <= start < end <= len(layers):
            raise ValueError(
                f"LoraConfig: layer_replication: got [{start}, {end}], expected a range within the "
                f"{len(layers)} layers"
            )
    compiled = [m for layer in layers for m in layer.modules() if m._compiled_call_impl is not None]
    replaced = [m for layer in layers for m in layer.modules() if "forward" in m.__dict__]
    if replaced:
        raise ValueError(
            f"LoraConfig: layer_replication: the forward of a {type(replaced[0]).__qualname__} in "
            "the layers is replaced on the instance (as accelerate's hooks do), expected the "
            "class's own, which copies can share; take the hooks off first and put them on again "
            "after"
        )
    if compiled:
        warn(
            f"LoraConfig: layer_replication: a {type(compiled[0]).__qualname__} in the layers is "
            "compiled in place, the copies are not; compile them again"
        )
    copies = nn.ModuleList(
        _shared_copy(layers[i]) for start, end in layer_map for i in range(start, end)
    )
    for index, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # transformers finds a layer's cache by it
                module.layer_idx = index  # type: ignore[assignment]
    config: Any = getattr(parent, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    transaction.put(parent._modules, name, copies)
    if count is not None:
        transaction.set_attribute(config, "num_hidden_layers", len(copies))
    transaction.commit()


def _layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    """Where PEFT looks: the layers of models like Llama, BERT and Falcon."""
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    for part in ("bert", "transformer"):
        inner = getattr(inner, part, inner)
    encoder = getattr(inner, "encoder", None)
    for parent, name in ((inner, "layers"), (encoder, "layer"), (inner, "h")):
        if isinstance(parent, nn.Module) and isinstance(getattr(parent, name, None), nn.ModuleList):
            return parent, name
    raise ValueError(
        "LoraConfig: layer_replication: found no list of layers (layers, encoder.layer or h), "
        "expected a model like Llama, BERT or Falcon"
    )


def _shared_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same parameters and buffers."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(without_bound_calls(module))
    for registry in ("_parameters", "_buffers"):
        copied.__dict__[registry] = dict(module.__dict__[registry])
    copied.__dict__["_modules"] = {
        name: child if child is None else _shared_copy(child)
        for name, child in module._modules.items()
    }
    return copied
