"""Which layers of a model EVA looks at, how, and how many components of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_ext.adapters.activation import switched_back
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.calibrated_configs import EvaConfig
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.inject import adapted
from lora_ext.calibration.eva_inputs import all_rows
from lora_ext.calibration.eva_pass import WHERE
from lora_ext.calibration.layers import linear_targets
from lora_ext.nn import Linear
from lora_ext.nn.transaction import AtTheEnd, Transaction

PREFIX = "base_model.model."  # of a layer's name in a model with adapters
_HIGH_RHO = 1000  # from here on rho is at most what the largest dimension has ranks for, as in PEFT

LayerInputs = Callable[[Any, Any, str], Tensor]


def layers_of(
    model: nn.Module, peft_config: LoraConfig | None, adapter_name: str
) -> tuple[AdaptedModel | None, dict[str, nn.Module], LoraConfig]:
    if hasattr(model, "peft_config"):
        found, injected = adapted(model, WHERE)
        found._check_names([adapter_name])
        config = found.peft_config[adapter_name]
        if peft_config is not None:
            config = LoraConfig.of(peft_config, WHERE)
        prefix = "" if injected else PREFIX
        layers = {
            f"{prefix}{name}": layer
            for name, layer in found.layers_with(adapter_name)
            if isinstance(layer, Linear)
        }
        if not layers:
            raise ValueError(f"{WHERE}: model: got no linear layer with '{adapter_name}'")
        return found, dict(layers), config
    if peft_config is None:
        raise ValueError(
            f"{WHERE}: peft_config: got None, expected one: peft_config is required if model is "
            "not a PeftModel"
        )
    config = LoraConfig.of(peft_config, WHERE)
    return None, linear_targets(WHERE, model, config), config


@contextmanager
def switched_off(found: AdaptedModel | None) -> Iterator[None]:
    """Within this context a model is its base."""
    if found is None:
        yield
        return
    restore = switched_back(found)
    with AtTheEnd(restore):
        transaction = Transaction()
        for _, layer in found.adapter_layers():
            transaction.draft(layer).enable_adapters(False)
        for _, module in found.saved_modules():
            transaction.set(module, enabled=False)
        transaction.commit()
        yield


def per_layer(
    layers: Iterable[str], given: LayerInputs | Mapping[str, LayerInputs] | None
) -> dict[str, LayerInputs]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(layers, given or all_rows)
    functions: dict[str, LayerInputs] = {name: given.get(name) or all_rows for name in layers}
    if unknown := sorted(given.keys() - functions.keys()):
        raise ValueError(
            f"{WHERE}: prepare_layer_inputs_fn: got {unknown[:5]}, which were not found in the "
            f"model, expected some of {list(functions)[:5]}..."
        )
    return functions


def rho_of(model: nn.Module, config: LoraConfig, eva: EvaConfig) -> float:
    if eva.rho <= _HIGH_RHO:
        return eva.rho
    largest = max(max(parameter.shape) for parameter in model.parameters() if parameter.dim())
    return min(eva.rho, largest // config.r)
