"""Putting the fused forward into PEFT's layers: of the process, or of one model."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from lora_ext import blocks
from lora_ext.arguments import as_flag, check_module
from lora_ext.integrations.peft import config, layers

Model = TypeVar("Model", bound=nn.Module)
# A class, what is replaced in it, its own, and that of lora_ext.
_PATCHES: tuple[tuple[Any, str, Any, Any], ...] = (
    (peft_layer.Linear, "forward", layers.PEFT_LINEAR_FORWARD, layers.linear_forward),
    (peft_layer.Embedding, "forward", layers.PEFT_EMBEDDING_FORWARD, layers.embedding_forward),
    (PeftAdapterMixin, "add_adapter", config.TRANSFORMERS_ADD_ADAPTER, config.add_adapter),
)
_ACCELERATED: dict[Any, Any] = {
    peft_layer.Linear: layers.Linear,
    peft_layer.Embedding: layers.Embedding,
}


def patch() -> None:
    """Lets PEFT's LoRA layers run the fused operators in this process: those of models that are
    there and of models to come, loaded ones too. What cannot be fused PEFT runs as before, and
    `report` says why. State dicts, hooks, autocast and repr are PEFT's. `add_adapter` of a model of
    transformers takes a `lora_ext.LoraConfig` too. Patching twice is as once.

    What torch.compile made before is compiled again, as after `torch.compiler.reset()`: it is made
    of the other forward, and the compiler would use it for new models too.

    Raises:
        RuntimeError: something else has replaced one of these functions.
    """
    _replace("patch", patched=True)


def unpatch() -> None:
    """Takes back what `patch` did.

    Raises:
        RuntimeError: something else has replaced one of these functions since.
    """
    _replace("unpatch", patched=False)


def is_patched() -> bool:
    """Whether `patch` is in force."""
    return all(getattr(kind, name) is ours for kind, name, _, ours in _PATCHES)


def _replace(operation: str, patched: bool) -> None:
    for kind, name, own, ours in _PATCHES:
        now = getattr(kind, name)
        if now not in (own, ours):
            raise RuntimeError(
                f"{operation}: {kind.__module__}.{kind.__name__}.{name}: got one of "
                f"{getattr(now, '__module__', '?')}, expected its own or the one of lora_ext; undo "
                "the other patch first"
            )
    if is_patched() != patched and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    for kind, name, own, ours in _PATCHES:
        setattr(kind, name, ours if patched else own)


def accelerate(model: Model, *, fuse_blocks: bool = False) -> Model:
    """Lets the LoRA layers of one PEFT model run the fused operators, in place: their class becomes
    `lora_ext.integrations.peft.Linear` or `Embedding`, which extend PEFT's. Adapters may be added,
    loaded and deleted as before; layers that these add to the model need another call. A copy or a
    pickle of the model stays accelerated.

    Args:
        model: one with LoRA layers of PEFT.
        fuse_blocks: run its blocks as one operator each, too; see `lora_ext.fuse_blocks`, which
            takes PEFT's models also after `patch()`.

    Returns: model.

    Raises:
        ValueError: the model has no such layer.
    """
    check_module("accelerate", "model", model)
    fuse = as_flag(fuse_blocks, "accelerate", "fuse_blocks")
    found = [m for m in model.modules() if type(m) in _ACCELERATED]
    if not found and not any(isinstance(m, tuple(_ACCELERATED.values())) for m in model.modules()):
        raise ValueError(
            f"accelerate: model: got a {type(model).__qualname__} without lora.Linear or "
            "lora.Embedding of PEFT, expected one from peft.get_peft_model or PeftModel; for a "
            "plain model use lora_ext.get_lora_model"
        )
    for module in found:
        module.__class__ = _ACCELERATED[type(module)]
    if fuse:
        blocks.fuse_or_warn(model, "accelerate")
    return model
