"""Configs of lora_ext where PEFT's are asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
from transformers.integrations.peft import PeftAdapterMixin

from lora_ext.adapters.config import LoraConfig

TRANSFORMERS_ADD_ADAPTER = PeftAdapterMixin.add_adapter


def peft_config(config: LoraConfig) -> peft.LoraConfig:
    """A config of lora_ext as one of PEFT's, for what checks for these: TRL's `peft_config=`, a
    model of transformers.

    Raises:
        ValueError: a setting that PEFT does not have.
    """
    config = LoraConfig.of(config, "peft_config")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"peft_type"}
    values = {name: value for name, value in config.to_dict().items() if name != "peft_type"}
    unknown = sorted(name for name, value in values.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"peft_config: config: got {unknown[0]}={values[unknown[0]]!r}, expected fields that "
            f"PEFT {peft.__version__} has; leave it out, or use lora_ext.get_lora_model"
        )
    return peft.LoraConfig(**{name: value for name, value in values.items() if name in known})


def add_adapter(self: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    """transformers' `add_adapter`, which takes a config of lora_ext too."""
    if isinstance(adapter_config, LoraConfig):
        adapter_config = peft_config(adapter_config)
    TRANSFORMERS_ADD_ADAPTER(self, adapter_config, adapter_name)
