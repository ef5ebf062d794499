"""Which class a model with adapters gets: that of its task."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=type)
_CLASSES: dict[str | None, type] = {}
_KINDS: dict[str, type] = {}


def for_task(task_type: str | None) -> Callable[[Kind], Kind]:
    """Makes a class that of the models of a task."""

    def register(kind: Kind) -> Kind:
        _CLASSES[task_type] = kind
        return kind

    return register


def for_kind(peft_type: str) -> Callable[[Kind], Kind]:
    """Makes a class that of the models of another kind of adapters than LoRA."""

    def register(kind: Kind) -> Kind:
        _KINDS[peft_type] = kind
        return kind

    return register


def class_of_kind(peft_type: object) -> Any:
    """The class of a kind of adapters; None for LoRA, and for kinds that are not here."""
    return _KINDS.get(peft_type) if isinstance(peft_type, str) else None


def class_for(model: nn.Module, task_type: str | None) -> Any:
    """The class of a task, for a model that takes `input_ids` as the task's models do. With PEFT
    imported, or installed for a model of transformers, it is PEFT's, too: Trainers ask `isinstance`
    of it for how to call and to save it, and to go on training."""
    takes_tokens = "input_ids" in inspect.signature(model.forward).parameters
    kind = _CLASSES.get(task_type if takes_tokens else None, _CLASSES[None])
    return _also_pefts(kind, model)


def also_pefts(model: Any) -> Any:
    """A model with adapters, whose class is PEFT's, too, as of `class_for`."""
    model.__class__ = _also_pefts(type(model), model.get_base_model())
    return model


def _also_pefts(kind: type, model: nn.Module) -> type:
    of_transformers = any(one.__module__.startswith("transformers.") for one in type(model).mro())
    if "peft" in sys.modules or (of_transformers and importlib.util.find_spec("peft") is not None):
        found = importlib.import_module("lora_ext.adapters.also_peft")
        return getattr(found, kind.__name__, kind)
    return kind
