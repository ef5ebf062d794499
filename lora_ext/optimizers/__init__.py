"""Optimizers for adapters, in the place where PEFT has them: LoRA+ and LoRA-FA."""

from lora_ext.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from lora_ext.optimizers.loraplus import create_loraplus_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]
