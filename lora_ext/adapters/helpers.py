"""PEFT's small helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.xlora.config import XLoraConfig, is_xlora
from lora_ext.arguments import as_number, check_module, refuse, short
from lora_ext.nn import LoraLayer
from lora_ext.nn.transaction import AtTheEnd, Transaction


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or an id on the hub, is an adapter, or an X-LoRA model, of which the config
    is read."""
    kinds: tuple[Any, ...] = (LoraConfig, XLoraConfig)
    for kind in kinds:
        try:
            kind.from_pretrained(model_name_or_path)
        except (OSError, TypeError, ValueError, NotImplementedError):
            continue
        return True
    return False


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context every adapter's scaling is `multiplier` times what it is now.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no layer with adapters.
    """
    where = "rescale_adapter_scale"
    check_module(where, "model", model)
    factor = as_number(multiplier, where, "multiplier", "a number (Argument multiplier)")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"{where}: model: got one without layers that have adapters, expected some: scaling is "
            "only supported for models with LoraLayers"
        )
    before = [(layer, {name: layer.get_scale(name) for name in layer.adapters}) for layer in layers]

    def scale(by: float) -> None:
        transaction = Transaction()
        for layer, scales in before:
            for name, value in scales.items():
                if name in layer.adapters:
                    draft = transaction.draft(layer)
                    draft._scaling[name] = by * value
                    draft._choose_running()
        transaction.commit()

    with AtTheEnd(lambda: scale(1.0)):
        scale(factor)
        yield


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig | XLoraConfig:
    """A config of a dict of its fields: `LoraConfig.from_peft_type(**config_dict)`, or X-LoRA's.

    Raises:
        TypeError: it is no dict.
        ValueError: it does not say its `peft_type`.
    """
    where = "get_peft_config"
    if not isinstance(config_dict, Mapping):
        refuse(where, "config_dict", config_dict, "a dict of a config's fields")
    if "peft_type" not in config_dict:
        got = short(list(config_dict))
        raise ValueError(f"{where}: config_dict: got {got}, expected 'peft_type': 'LORA' with them")
    if is_xlora(config_dict):
        return XLoraConfig.from_dict(config_dict)
    return LoraConfig.from_peft_type(**config_dict)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes parameters that train float32 and all others `dtype`, in place.

    Raises:
        TypeError: the model is no module, or the dtype not a floating one.
    """
    where = "cast_mixed_precision_params"
    check_module(where, "model", model)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        refuse(where, "dtype", dtype, "a floating torch.dtype, such as torch.bfloat16")
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)
