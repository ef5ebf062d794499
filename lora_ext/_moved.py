"""Former names of modules: they still import, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lora_ext.nn.arguments": "lora_ext.arguments",
    "lora_ext.nn.settings": "lora_ext.nn.adapter",
    "lora_ext.nn.default_adapter": "lora_ext.nn.adapter",
    "lora_ext.adapters.modules_to_save": "lora_ext.nn.modules_to_save",
    "lora_ext.adapters.combination": "lora_ext.adapters.combine.request",
    "lora_ext.adapters.combining": "lora_ext.adapters.combine.tensors",
    "lora_ext.adapters.task_arithmetic": "lora_ext.adapters.combine.mixing",
    "lora_ext.adapters.weighted": "lora_ext.adapters.combine.model",
    "lora_ext.adapters.injection": "lora_ext.adapters.replace_linear",
    "lora_ext.io.base_tensors": "lora_ext.adapters.checkpoint.base_tensors",
    "lora_ext.io.grouped_convolutions": "lora_ext.adapters.checkpoint.grouped_convolutions",
    "lora_ext.io.plain_lora": "lora_ext.adapters.checkpoint.plain_lora",
    "lora_ext.io.reading": "lora_ext.adapters.checkpoint.reading",
    "lora_ext.io.savable": "lora_ext.adapters.checkpoint.savable",
    "lora_ext.io.peft": "lora_ext.adapters.checkpoint",
}


class _FormerName:
    """Finder and loader of modules under the names that they had: each is a module of its own that
    has what the one of the new name has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        now = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {now} now", DeprecationWarning, stacklevel=2)
        found = vars(importlib.import_module(now))
        vars(module).update({key: value for key, value in found.items() if key[:2] != "__"})
        module.__doc__ = f"The former name of {now}."


def resolve_former_names() -> None:
    """Makes them importable."""
    if not any(type(finder).__name__ == _FormerName.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_FormerName())
