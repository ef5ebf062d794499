"""What the classifier of a model gave, and what is done with it: part of `XLoraModel`."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from lora_ext.adapters.lora_model import LoraModel
from lora_ext.adapters.xlora.classifier import XLoraClassifier
from lora_ext.adapters.xlora.config import XLoraConfig, checked_top_k, finite
from lora_ext.arguments import as_flag


class ScalingsLog:
    """The scalings of the last call, and of all while it is enabled. A copy of a model has an empty
    one: what has gradients cannot be copied."""

    def __init__(self) -> None:
        self.enabled = False
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []

    def note(self, scalings: Tensor) -> None:
        self.latest = scalings
        if self.enabled:
            self.log.append(scalings.detach())

    def by_tokens(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.log):
            places, logged = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            logged.append(scalings)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class ScaledModel(LoraModel):
    """The scalings of an `XLoraModel`, with PEFT's names."""

    xlora_config: XLoraConfig
    internal_xlora_classifier: XLoraClassifier
    _scalings: ScalingsLog

    def _note_scalings(self, scalings: Tensor) -> None:
        layers = self.internal_xlora_classifier.n_layers
        self._scalings.note(scalings.expand(-1, -1, layers, -1))

    def set_topk_lora(self, value: int | None) -> None:
        """How many adapters a token has; None: all. Kept in the config."""
        if value is not None:
            value = checked_top_k(value, self.xlora_config.adapters, "XLoraModel.set_topk_lora")
        self.xlora_config.top_k_lora = value

    def get_topk_lora(self) -> int | None:
        """How many adapters a token has; None: all."""
        return self.xlora_config.top_k_lora

    def set_global_scaling_weight(self, weight: float) -> None:
        """What multiplies all scalings. Kept in the config."""
        where = "XLoraModel.set_global_scaling_weight"
        self.xlora_config.global_scaling_weight = finite(weight, where, "weight")

    def get_global_scaling_weight(self) -> float:
        """What multiplies all scalings."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The scaling of all adapters in the scaling pass; None: one over their number. Kept in the
        config."""
        where = "XLoraModel.set_scaling_pass_value"
        number = 1.0 / len(self.peft_config) if value is None else finite(value, where, "value")
        self.xlora_config.scaling_pass_value = number

    def get_latest_scalings(self) -> Tensor | None:
        """Those of the last call, of whichever thread, as the classifier gave them (before top_k):
        [requests, tokens, layers, adapters]."""
        return self._scalings.latest

    def get_scalings_log(self) -> list[Tensor]:
        """Those of all calls while they were logged, without gradients; a list of its own."""
        return list(self._scalings.log)

    def enable_scalings_logging(self) -> None:
        """From now on calls are logged."""
        self._scalings.enabled = True

    def disable_scalings_logging(self) -> None:
        """From now on calls are not logged; the log stays."""
        self._scalings.enabled = False

    def clear_scalings_log(self) -> None:
        """Empties the log."""
        self._scalings.log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by numbers of tokens: places in the log, and what is there."""
        return self._scalings.by_tokens()

    def set_use_trainable_adapters(self, use_trainable_adapters: bool) -> None:
        """Whether the adapters train beside the classifier. Kept in the config."""
        where = "XLoraModel.set_use_trainable_adapters"
        flag = as_flag(use_trainable_adapters, where, "use_trainable_adapters")
        super().set_requires_grad(list(self.peft_config), flag)
        self.xlora_config.use_trainable_adapters = flag

    def get_use_trainable_adapters(self) -> bool:
        """Whether the adapters train beside the classifier."""
        return self.xlora_config.use_trainable_adapters
