"""What stands between a LoraModel and the model in it: PEFT's `base_model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lora_ext.nn.adoption import BOUND_CALLS

# What PEFT's tuner does itself; here a LoraModel does it.
_OF_THE_OWNER = frozenset(
    "active_adapters add_weighted_adapter delete_adapter disable_adapter_layers "
    "enable_adapter_layers get_layer_status get_model_status merge_adapter merge_and_unload "
    "peft_config peft_type prefix rename_adapter set_adapter set_requires_grad "
    "supports_lora_conversion targeted_module_names targeted_parameter_names unload "
    "unmerge_adapter".split()
)

_OWN = frozenset({"model", "training", "forward"})  # what hooks put around forward is this one's


class Tuner(nn.Module):
    """Holds the adapted model, so that names of parameters begin with `base_model.model.`, as in
    PEFT and in its files. Calls go to the model, and so do attributes, but for those of PEFT's
    tuners, which are the LoraModel's.

    Attributes:
        model: the adapted model.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        super().__init__()
        self.model = model
        vars(self)["_owner"] = owner  # no submodule: it is around this
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that runs; a list where they are not one, as in PEFT."""
        names: list[str] = self.active_adapters
        return names[0] if len(names) == 1 else names

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model has is set there: `base_model` was the model itself once. What nn.Module
        keeps of this module stays here."""
        model = vars(self).get("_modules", {}).get("model")
        own = name in _OWN or name.startswith("_")
        if model is not None and not own and hasattr(model, name):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return cast(Any, self.model)[key]

    def __len__(self) -> int:
        return len(cast(Any, self.model))

    def __iter__(self) -> Iterator[Any]:
        return iter(cast(Any, self.model))

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_OWNER:
            return getattr(vars(self)["_owner"], name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name in BOUND_CALLS:  # not yet made; hooks of the model's own
                raise
            return getattr(self.model, name)
