"""Former names of modules and of what was in them: still there, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lora_ext.arguments import warn

MOVED = {
    "lora_ext.nn.arguments": "lora_ext.arguments",
    "lora_ext.nn.settings": "lora_ext.nn.adapter",
    "lora_ext.nn.default_adapter": "lora_ext.nn.adapter",
    "lora_ext.adapters.layers": "lora_ext.nn.kinds",
    "lora_ext.adapters.patterns": "lora_ext._patterns",
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

# What has another place or name than before, in modules that are there and in those above.
RENAMED = {
    "lora_ext.adapters.config.ATOMS": "lora_ext.adapters.config_checks.ATOMS",
    "lora_ext.adapters.config.CONFIG_NAME": "lora_ext.io.CONFIG_NAME",
    "lora_ext.adapters.config.FILE_SECONDS": "lora_ext._patterns.FILE_SECONDS",
    "lora_ext.adapters.config.NOT_BUILT": "lora_ext._not_built.FIELDS",
    "lora_ext.adapters.config_checks.NOT_BUILT": "lora_ext._not_built.FIELDS",
    "lora_ext.adapters.layers.adaptable": "lora_ext.nn.kinds.layer_for",
    "lora_ext.adapters.lora_model.get_lora_model": "lora_ext.adapters.tasks.get_lora_model",
    "lora_ext.adapters.lora_model.get_peft_model": "lora_ext.adapters.tasks.get_peft_model",
    "lora_ext.adapters.targets.ADAPTABLE": "lora_ext.nn.kinds.BASE_CLASSES",
    "lora_ext.adapters.targets.is_adaptable": "lora_ext.nn.kinds.is_of_a_kind",
    "lora_ext.io.base_tensors.around_others": "lora_ext.adapters.checkpoint.keys.around_others",
    "lora_ext.io.base_tensors.around_planned": "lora_ext.adapters.checkpoint.keys.around_planned",
    "lora_ext.io.base_tensors.name_in_file": "lora_ext.adapters.checkpoint.keys.name_in_file",
    "lora_ext.io.files.typed_content": "lora_ext.adapters.checkpoint.load.typed_content",
    "lora_ext.io.peft.PREFIX": "lora_ext.adapters.checkpoint.keys.PREFIX",
    "lora_ext.io.peft.read_config": "lora_ext.adapters.checkpoint.load.read_config",
    "lora_ext.nn.conv._LoraConv": "lora_ext.nn.conv.LoraConv",
    "lora_ext.nn.lora_layer.LowRank": "lora_ext.nn.adapter.LowRank",
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
        warn(f"{module.__name__} is {now} now", DeprecationWarning)
        found = vars(importlib.import_module(now))
        vars(module).update({key: value for key, value in found.items() if key[:2] != "__"})
        module.__doc__ = f"The former name of {now}."
        _resolve_names_in(module)


def _resolve_names_in(module: ModuleType) -> None:
    """Gives a module the names that were in it, when they are asked for."""
    where = module.__name__

    def find(name: str) -> Any:
        if f"{where}.{name}" in MOVED:
            return importlib.import_module(f"{where}.{name}")
        now = RENAMED.get(f"{where}.{name}")
        if now is None:
            raise AttributeError(f"module {where!r} has no attribute {name!r}")
        warn(f"{where}.{name} is {now} now", DeprecationWarning)
        path, _, name = now.rpartition(".")
        return getattr(importlib.import_module(path), name)

    module.__getattr__ = find  # type: ignore[method-assign]


def resolve_former_names() -> None:
    """Makes them importable."""
    for former in (*MOVED, *RENAMED):
        if (module := sys.modules.get(former.rpartition(".")[0])) is not None:
            _resolve_names_in(module)
    if not any(type(finder).__name__ == _FormerName.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_FormerName())
