"""PEFT's small helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.arguments import as_number, check_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.transaction import AtTheEnd, Transaction


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or an id on the hub, is an adapter that `LoraConfig.from_pretrained`
    reads."""
    try:
        LoraConfig.from_pretrained(model_name_or_path)
    except (OSError, TypeError, ValueError, NotImplementedError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context every adapter's scaling is `multiplier` times what it is now.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no layer with adapters.
    """
    where = "rescale_adapter_scale"
    check_module(where, "model", model)
    factor = as_number(multiplier, where, "multiplier", "a number (Argument multiplier)")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"{where}: model: got one without layers that have adapters, expected some: scaling is "
            "only supported for models with LoraLayers"
        )
    before = [(layer, {name: layer.get_scale(name) for name in layer.adapters}) for layer in layers]

    def scale(by: float) -> None:
        transaction = Transaction()
        for layer, scales in before:
            for name, value in scales.items():
                if name in layer.adapters:
                    draft = transaction.draft(layer)
                    draft._scaling[name] = by * value
                    draft._choose_running()
        transaction.commit()

    with AtTheEnd(lambda: scale(1.0)):
        scale(factor)
        yield
