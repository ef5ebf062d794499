"""What stands in a model for modules of whose weight rows are trained. Names are PEFT's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora_ext.nn.trainable_tokens import TrainableTokensLayer


class TiedTokensLayer(nn.Module):
    """What stands around a module that shares its weight with an embedding of which rows are
    trained: it has the same rows, and nothing of its own.

    Attributes:
        base_layer: the module itself.
        tied_adapter: the layer of the embedding.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, source: TrainableTokensLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._source = [source]  # in a list: it is no child
        self.training = base_layer.training

    @property
    def tied_adapter(self) -> TrainableTokensLayer:
        return self._source[0]

    trainable_tokens_delta = property(lambda self: self.tied_adapter.trainable_tokens_delta)
    trainable_tokens_original = property(lambda self: self.tied_adapter.trainable_tokens_original)
    token_indices = property(lambda self: self.tied_adapter.token_indices)
    adapters = property(lambda self: self.tied_adapter.adapters)
    active_adapters = property(lambda self: self.tied_adapter.active_adapters)
    merged_adapters = property(lambda self: self.tied_adapter.merged_adapters)
    merged = property(lambda self: self.tied_adapter.merged)
    disable_adapters = property(lambda self: self.tied_adapter.disable_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's, where the rows of the embedding are its weight's."""
        return self.tied_adapter.run(self.base_layer, *args, **kwargs)

    def running_weight(self) -> Tensor:
        return self.tied_adapter.running_weight()

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        return self.tied_adapter.explain_of(self.base_layer)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the base's own values, as that of the embedding."""
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        keep_vars = args[2] if len(args) > 2 else kwargs.get("keep_vars", False)
        for name, base in self.tied_adapter.base_parameters.items():
            state[prefix + name] = base if keep_vars else base.detach()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What the embedding has loaded stays, with what is merged there."""
        key = f"{prefix}base_layer.weight"
        if self.merged and key in state_dict:
            state_dict[key] = self.tied_adapter.weight.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


class TrainableTokensWrapper(nn.Module):
    """What stands in the place of the module. Attributes that it lacks are the module's; `weight`
    has the rows that run, for models that read it.

    Attributes:
        token_adapter: the layer.
    """

    token_adapter: TrainableTokensLayer | TiedTokensLayer

    def __init__(self, token_adapter: TrainableTokensLayer | TiedTokensLayer) -> None:
        super().__init__()
        self.token_adapter = token_adapter
        self.training = token_adapter.training

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """As the layer's, or that of the one it follows."""
        layer = self.token_adapter.tied_adapter or self.token_adapter
        assert isinstance(layer, TrainableTokensLayer)
        layer.set_adapter(adapter_names, inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter" or name.startswith("__"):
                raise
            if name == "weight":
                return self.token_adapter.running_weight()
            return getattr(self.token_adapter.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """The module's parameters are set there (`head.weight = embedding.weight`)."""
        adapter = self.__dict__.get("_modules", {}).get("token_adapter")
        if adapter is not None and name in adapter.base_layer._parameters:
            setattr(adapter.base_layer, name, value)
        else:
            super().__setattr__(name, value)
