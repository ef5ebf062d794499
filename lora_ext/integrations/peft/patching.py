"""Putting the fused forward into PEFT's layers: of the process, or of one model."""

from __future__ import annotations

from typing import Any, TypeVar

from peft.tuners.lora import layer as peft_layer
from torch import nn

from lora_ext.arguments import check_module
from lora_ext.integrations.peft import layers

Model = TypeVar("Model", bound=nn.Module)
# PEFT's class, its own forward, and that with the operators here.
_PATCHES: tuple[tuple[Any, Any, Any], ...] = (
    (peft_layer.Linear, layers.PEFT_LINEAR_FORWARD, layers.linear_forward),
    (peft_layer.Embedding, layers.PEFT_EMBEDDING_FORWARD, layers.embedding_forward),
)
_ACCELERATED: dict[Any, Any] = {
    peft_layer.Linear: layers.Linear,
    peft_layer.Embedding: layers.Embedding,
}


def patch() -> None:
    """Lets PEFT's LoRA layers run the fused operators in this process: those of models that are
    there and of models to come, loaded ones too. What cannot be fused PEFT runs as before, and
    `report` says why. State dicts, hooks, autocast and repr are PEFT's. Patching twice is as once.

    Code that torch.compile made before goes on as it was.

    Raises:
        RuntimeError: something else has replaced a forward of PEFT's.
    """
    _replace("patch", {ours: True for _, _, ours in _PATCHES})


def unpatch() -> None:
    """Takes back what `patch` did.

    Raises:
        RuntimeError: something else has replaced the forward since.
    """
    _replace("unpatch", {ours: False for _, _, ours in _PATCHES})


def is_patched() -> bool:
    """Whether `patch` is in force."""
    return all(kind.forward is ours for kind, _, ours in _PATCHES)


def _replace(operation: str, fused: dict[object, bool]) -> None:
    for kind, peft, ours in _PATCHES:
        if kind.forward not in (peft, ours):
            module = getattr(kind.forward, "__module__", "?")
            raise RuntimeError(
                f"{operation}: peft.tuners.lora.{kind.__name__}.forward: got one of {module}, "
                "expected PEFT's own or the one of lora_ext; undo the other patch first"
            )
    for kind, peft, ours in _PATCHES:
        kind.forward = ours if fused[ours] else peft


def accelerate(model: Model) -> Model:
    """Lets the LoRA layers of one PEFT model run the fused operators, in place: their class becomes
    `lora_ext.integrations.peft.Linear` or `Embedding`, which extend PEFT's. Adapters may be added,
    loaded and deleted as before; layers that these add to the model need another call. A copy or a
    pickle of the model stays accelerated.

    Returns: model.

    Raises:
        ValueError: the model has no such layer.
    """
    check_module("accelerate", "model", model)
    found = [m for m in model.modules() if type(m) in _ACCELERATED]
    if not found and not any(isinstance(m, tuple(_ACCELERATED.values())) for m in model.modules()):
        raise ValueError(
            f"accelerate: model: got a {type(model).__qualname__} without lora.Linear or "
            "lora.Embedding of PEFT, expected one from peft.get_peft_model or PeftModel; for a "
            "plain model use lora_ext.get_lora_model"
        )
    for module in found:
        module.__class__ = _ACCELERATED[type(module)]
    return model
