"""PEFT's LoRA layers with a fused forward, as classes of their own."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from lora_ext.integrations.peft import embedding, linear
from lora_ext.integrations.peft.fusible import LeftToPeft

FUSED = "fused"
BASE_ALONE = "base alone"
# How the calls of PEFT's layers ran: FUSED, BASE_ALONE (merged, disabled, no adapter active), or
# why PEFT ran one with adapters. Calls inside compiled graphs are not counted.
calls: Counter[str] = Counter()

# PEFT's own, whatever is patched now.
PEFT_LINEAR_FORWARD = peft_layer.Linear.forward
PEFT_EMBEDDING_FORWARD = peft_layer.Embedding.forward


def _count(outcome: str) -> None:
    if not torch.compiler.is_compiling():
        calls[outcome] += 1


def linear_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's `lora.Linear.forward`, fused where it can be."""
    return _forward(self, x, args, kwargs, linear, PEFT_LINEAR_FORWARD)


def embedding_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's `lora.Embedding.forward`, fused where it can be."""
    return _forward(self, x, args, kwargs, embedding, PEFT_EMBEDDING_FORWARD)


def _forward(
    layer: Any,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: Any,
    peft_forward: Any,
) -> Tensor:
    by_name = kwargs.get("adapter_names") is not None
    if layer.disable_adapters or (not by_name and kind.runs_base_alone(layer)):
        outcome = BASE_ALONE
    else:
        try:
            y: Tensor = kind.fused_forward(layer, x, args, kwargs)
        except LeftToPeft as reason:
            outcome = str(reason)
        else:
            _count(FUSED)
            return y
    _count(outcome)
    peft_y: Tensor = peft_forward(layer, x, *args, **kwargs)
    return peft_y


class Linear(peft_layer.Linear):
    """`peft.tuners.lora.Linear` whose forward is fused where it can be."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        if config.fan_in_fan_out and isinstance(base_layer, nn.Linear):
            # PEFT's own dispatcher does this, which custom modules do not pass.
            warnings.warn(
                "lora_ext.integrations.peft.Linear: fan_in_fan_out: got True, expected False for "
                "an nn.Linear; it is set to False",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    forward = linear_forward


class Embedding(peft_layer.Embedding):
    """`peft.tuners.lora.Embedding` whose forward is fused where it can be."""

    forward = embedding_forward
