"""A model and the adapters in it: what they are. What can be done with them is functions of the
other modules here, and methods of `LoraModel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules
from lora_ext.arguments import check_known, check_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.modules_to_save import ModulesToSave


class AdaptedModel(nn.Module):
    """A base model and the layers and modules to save that were put into it. Calls and attributes
    go through to the base.

    Attributes:
        base_model: the model itself, with the layers in it.
        peft_config: the configs, by the adapters' names.
        active_adapters: the names of the adapters that run.
        targeted_module_names, targeted_parameter_names: what the last adapter is on.
    """

    base_model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        # What this model put there: layers and modules to save. The base may have others, which
        # stay as they are: of a LoraModel inside it, or put there by hand.
        self._own: frozenset[nn.Module] = frozenset()
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters in it; `unload()` takes them out."""
        return self.base_model

    def lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The layers in which this model has adapters, by their names in the base model."""
        for name, module in named_modules(self.base_model):
            if isinstance(module, LoraLayer) and module in self._own:
                yield name, module

    def saved_modules(self) -> Iterator[tuple[str, ModulesToSave]]:
        """The modules of which this model has copies, by their names in the base model."""
        for name, module in named_modules(self.base_model):
            if isinstance(module, ModulesToSave) and module in self._own:
                yield name, module

    def layers_with(self, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
        """Those of `lora_layers()` that have this adapter."""
        for name, layer in self.lora_layers():
            if adapter_name in layer.adapters:
                yield name, layer

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        check_known("LoraModel", argument, names, self.peft_config)


def check_model(model: nn.Module) -> None:
    """TypeError unless adapters can be put into it."""
    check_module("LoraModel", "model", model)
    if isinstance(model, AdaptedModel):
        raise TypeError(
            "LoraModel: model: got a LoraModel; call its add_adapter() for another adapter"
        )
    for name, module in model.named_modules():
        if any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__):
            raise TypeError(
                f"LoraModel: model: got one with PEFT's layers ('{name}'), expected one without: "
                "they would be frozen and adapted once more; take PEFT's adapters out with "
                "unload(), and load them from their folder with LoraModel.from_pretrained"
            )
