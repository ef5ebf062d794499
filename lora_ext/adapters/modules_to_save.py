"""Modules that are trained and saved whole, a copy for each adapter."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lora_ext.nn.lora_layer import check_adapter_name


class ModulesToSave(nn.Module):
    """A module and its copies: the active adapter's runs, the original where none is active."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.enabled = True
        self.training = original_module.training

    def add_adapter(self, adapter_name: str) -> None:
        """Adds a copy of the original module."""
        check_adapter_name(adapter_name, list(self.modules_to_save), "modules_to_save")
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets a copy."""
        del self.modules_to_save[adapter_name]
        if self.active_adapter == adapter_name:
            self.active_adapter = None

    def rename_adapter(self, old: str, new: str) -> None:
        """Gives a copy another name."""
        self.modules_to_save[new] = self.modules_to_save.pop(old)
        if self.active_adapter == old:
            self.active_adapter = new

    def set_adapter(self, adapter_name: str | None, inference_mode: bool = False) -> None:
        """Makes one copy run and train; None the original."""
        self.active_adapter = adapter_name
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name == adapter_name and not inference_mode)

    @property
    def active_module(self) -> nn.Module:
        """The module that runs."""
        if self.enabled and self.active_adapter is not None:
            return self.modules_to_save[self.active_adapter]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.active_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.active_module, name)  # such as an embedding's weight
