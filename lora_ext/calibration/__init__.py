"""Adapters that start from data: one calibration pass, of which EVA, CorDA and LoRA-GA are made."""

from lora_ext.calibration.corda import preprocess_corda
from lora_ext.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
from lora_ext.calibration.lora_ga import preprocess_loraga

__all__ = [
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
]
