"""What stands between a LoraModel and the model in it: PEFT's `base_model`."""

from __future__ import annotations

from typing import Any

from torch import nn

# What PEFT's tuner does itself; here a LoraModel does it.
_OF_THE_OWNER = frozenset(
    "active_adapters active_adapter add_weighted_adapter delete_adapter disable_adapter_layers "
    "enable_adapter_layers get_layer_status get_model_status merge_adapter merge_and_unload "
    "peft_config peft_type prefix rename_adapter set_adapter set_requires_grad "
    "targeted_module_names targeted_parameter_names unload unmerge_adapter".split()
)


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

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_OWNER:
            return getattr(vars(self)["_owner"], name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not yet made
                raise
            return getattr(self.model, name)
